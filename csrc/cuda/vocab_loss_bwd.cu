// gate_grad: one thread block per row, one read and one write, in place or not.
#include "device.cuh"
#include "kernels.h"

namespace megatron_deft::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) gate_grad_kernel(Shard shard, Gradient gradient) {
  const int64_t row = blockIdx.x;
  T* out = static_cast<T*>(gradient.out) + row * gradient.row_stride;
  const bool ignored = shard.ignored(row);
  const int64_t valid = ignored ? 0 : shard.vocab_valid;
  const int64_t target = ignored ? -1 : shard.target(row);
  const T* z = static_cast<const T*>(shard.logits) + row * shard.row_stride;
  const float m = gradient.row_max[row], scale = gradient.scale[row];
  for (int64_t i = threadIdx.x; i < shard.columns; i += kThreads) {
    float value = 0.0f;
    if (i < valid) value = scale * __expf(to_float(z[i]) - m);
    if (i == target) value = gradient.target_grad[row];
    from_float(value, out + i);
  }
}

}  // namespace

cudaError_t launch_gate_grad(const Shard& shard, const Gradient& gradient, Dtype dtype,
                             cudaStream_t stream) {
  if (shard.rows == 0) return cudaSuccess;
  dispatch(dtype, [&](auto tag) {
    gate_grad_kernel<decltype(tag)>
        <<<static_cast<unsigned>(shard.rows), kThreads, 0, stream>>>(shard, gradient);
  });
  return cudaGetLastError();
}

}  // namespace megatron_deft::cuda
