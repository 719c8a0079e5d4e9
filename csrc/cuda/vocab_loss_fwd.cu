// row_stats: one thread block per row, online softmax, one read of the logits.
#include <math_constants.h>

#include "device.cuh"
#include "kernels.h"

namespace megatron_deft::cuda {
namespace {

struct ExpOf {
  __device__ float operator()(float x) const { return __expf(x); }
};

__device__ Sums merged(const Sums& a, const Sums& b) { return merge(a, b, ExpOf{}); }

// The row's sums in thread 0. Fixed order of merges: the same bits from run to run.
__device__ Sums block_merge(Sums sums) {
  __shared__ Sums per_warp[kThreads / 32];
  for (int offset = 16; offset > 0; offset >>= 1) {
    Sums other;
    other.m = __shfl_down_sync(0xffffffffu, sums.m, offset);
    other.s1 = __shfl_down_sync(0xffffffffu, sums.s1, offset);
    other.s2 = __shfl_down_sync(0xffffffffu, sums.s2, offset);
    other.sh = __shfl_down_sync(0xffffffffu, sums.sh, offset);
    sums = merged(sums, other);
  }
  if (threadIdx.x % 32 == 0) per_warp[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kThreads / 32; ++warp) sums = merged(sums, per_warp[warp]);
  return sums;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) row_stats_kernel(Shard shard, float* out) {
  const int64_t row = blockIdx.x;
  Sums sums{-CUDART_INF_F, 0.0f, 0.0f, 0.0f};
  float target = 0.0f;
  if (shard.ignored(row)) {
    sums.m = 0.0f;
  } else {
    const T* z = static_cast<const T*>(shard.logits) + row * shard.row_stride;
    for (int64_t i = threadIdx.x; i < shard.vocab_valid; i += kThreads) {
      const float x = to_float(z[i]);
      if (x > sums.m) {  // a new maximum: bring the sums to it
        const float f = __expf(sums.m - x);
        sums.sh = f > 0.0f ? f * (sums.sh + (sums.m - x) * sums.s1) : 0.0f;
        sums.s1 *= f;
        sums.s2 *= f * f;
        sums.m = x;
      }
      // -inf: e = 0 and e * d must be 0; before any finite logit m is -inf as well.
      const float d = x == -CUDART_INF_F ? -1e30f : x - sums.m;
      const float e = __expf(d);
      sums.s1 += e;
      sums.s2 += e * e;
      sums.sh += e > 0.0f ? e * d : 0.0f;
    }
    sums = block_merge(sums);
    const int64_t column = shard.target(row);
    if (column >= 0) target = to_float(z[column]);
  }
  if (threadIdx.x == 0) {
    out[0 * shard.rows + row] = sums.m;
    out[1 * shard.rows + row] = sums.s1;
    out[2 * shard.rows + row] = sums.s2;
    out[3 * shard.rows + row] = sums.sh;
    out[4 * shard.rows + row] = target;
  }
}

}  // namespace

cudaError_t launch_row_stats(const Shard& shard, Dtype dtype, float* out, cudaStream_t stream) {
  if (shard.rows == 0) return cudaSuccess;
  dispatch(dtype, [&](auto tag) {
    row_stats_kernel<decltype(tag)>
        <<<static_cast<unsigned>(shard.rows), kThreads, 0, stream>>>(shard, out);
  });
  return cudaGetLastError();
}

}  // namespace megatron_deft::cuda
