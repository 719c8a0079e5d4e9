// gate_grad: one read and one write. scale_rows: neither, for rows whose factor is 1.
//
// Both work element by element, in place or not; a row is cut into parts of a few vectors for each
// thread, one part for each block.
#include "gradient.cuh"
#include "launch.cuh"

namespace megatron_deft::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 5;  // of a multiprocessor, each with 16 KB on the way

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gate_grad_kernel(Shard shard, Gradient gradient, int parts) {
  const int64_t row = blockIdx.x / static_cast<unsigned>(parts);
  const int part = static_cast<int>(blockIdx.x % static_cast<unsigned>(parts));
  const int64_t thread = static_cast<int64_t>(part) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(parts) * blockDim.x;
  T* out = static_cast<T*>(gradient.out) + gradient.offset(row);
  if (shard.ignored(row)) {
    clear(out, shard.columns, thread, threads);
    return;
  }
  const T* z = static_cast<const T*>(shard.logits) + shard.offset(row);
  const Slice<T> slice(z, shard.vocab_valid, part, parts);
  const RowOut g{gradient.row_max[row], gradient.scale[row], gradient.target_grad[row]};
  write_gradient(LastRead<T>{slice}, slice, g, shard.target(row), out);
  clear(out + shard.vocab_valid, shard.columns - shard.vocab_valid, thread, threads);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    scale_rows_kernel(Shard shard, const float* factor, int parts) {
  const int64_t row = blockIdx.x / static_cast<unsigned>(parts);
  const int part = static_cast<int>(blockIdx.x % static_cast<unsigned>(parts));
  const float f = factor[row];
  if (f == 1.0f || shard.ignored(row)) return;
  T* z = static_cast<T*>(const_cast<void*>(shard.logits)) + shard.offset(row);
  if (f == 0.0f) {  // whatever the row holds
    clear(z, shard.columns, static_cast<int64_t>(part) * blockDim.x + threadIdx.x,
          static_cast<int64_t>(parts) * blockDim.x);
    return;
  }
  const Slice<T> slice(z, shard.columns, part, parts);
  const int width = blockDim.x;
  Vector* body = const_cast<Vector*>(slice.body());
  for (int first = threadIdx.x; first < slice.count; first += kBatch * width) {
    Vector batch[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (first + u * width < slice.count) batch[u] = ptx::load_last(body + first + u * width);
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (first + u * width < slice.count)
        ptx::store_streaming(body + first + u * width,
                             map<T>(batch[u], [&](float x) { return x * f; }));
  }
  for (int i = threadIdx.x; i < slice.scalars; i += width) {
    T* x = z + slice.scalar_column(i);
    from_float(to_float(*x) * f, x);
  }
}

int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

}  // namespace

cudaError_t run_gate_grad(const Shard& shard, const Gradient& gradient, Dtype dtype,
                          cudaStream_t stream, const Plan& plan) {
  if (shard.rows == 0) return cudaSuccess;
  if (!fits(shard, plan) || plan.threads > kThreads) return cudaErrorInvalidValue;
  return dispatch(dtype, [&](auto tag) {
    return launch(gate_grad_kernel<decltype(tag)>, shard.rows, plan, false, 0, stream, shard,
                  gradient, plan.parts);
  });
}

cudaError_t run_scale_rows(const Shard& shard, const float* factor, Dtype dtype,
                           cudaStream_t stream, const Plan& plan) {
  if (shard.rows == 0) return cudaSuccess;
  if (!fits(shard, plan) || plan.threads > kThreads) return cudaErrorInvalidValue;
  return dispatch(dtype, [&](auto tag) {
    return launch(scale_rows_kernel<decltype(tag)>, shard.rows, plan, false, 0, stream, shard,
                  factor, plan.parts);
  });
}

cudaError_t launch_gate_grad(const Shard& shard, const Gradient& gradient, Dtype dtype,
                             cudaStream_t stream) {
  return run_gate_grad(shard, gradient, dtype, stream,
                       elementwise_plan(shard.rows, shard.columns, element_size(dtype)));
}

cudaError_t launch_scale_rows(const Shard& shard, const float* factor, Dtype dtype,
                              cudaStream_t stream) {
  return run_scale_rows(shard, factor, dtype, stream,
                        elementwise_plan(shard.rows, shard.columns, element_size(dtype)));
}

}  // namespace megatron_deft::cuda
