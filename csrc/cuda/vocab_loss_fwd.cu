// row_stats: one read of the logits, a block (or a cluster of blocks) for each row.
#include <type_traits>

#include "launch.cuh"
#include "row_reduce.cuh"

namespace megatron_deft::cuda {
namespace {

constexpr int kThreads = 256;
// Blocks of a multiprocessor, each with 32 KB on the way; selecting the top k takes more registers.
template <bool kTopk>
constexpr int kBlocks = kTopk ? 3 : 4;

struct Shared {
  SumsShared sums;
};
struct SharedWithTop {
  SumsShared sums;
  TopShared top;
};

template <typename T, bool kTopk>
__global__ void __launch_bounds__(kThreads, kBlocks<kTopk>)
    row_stats_kernel(Shard shard, int topk, int parts, float* stats) {
  using Memory = std::conditional_t<kTopk, SharedWithTop, Shared>;
  Memory& shared = *reinterpret_cast<Memory*>(ptx::shared_memory());
  const int64_t row = blockIdx.x / static_cast<unsigned>(parts);
  const int part = static_cast<int>(blockIdx.x % static_cast<unsigned>(parts));
  if (shard.ignored(row)) {
    if (part == 0) clear_stats(stats, shard.rows, row, topk);
    return;
  }
  const T* z = static_cast<const T*>(shard.logits) + shard.offset(row);
  // asked for now, it is there when the sums are
  const float z_y = threadIdx.x < kWarp ? target_logit(z, shard.target(row)) : 0.0f;
  const Slice<T> slice(z, shard.vocab_valid, part, parts);
  const FromGlobal<T, Read::kOnly> source{slice};
  const SliceSums slice_sums = reduce_slice<kTopk>(source, slice, shared, topk);
  const Sums sums = cluster_sums(slice_sums.of_thread, shared.sums, parts);
  if (threadIdx.x < kWarp) {
    const float x = kTopk ? cluster_top(slice_sums.top, parts) : 0.0f;
    if (part == 0) store_stats(stats, shard.rows, row, sums, z_y, x, topk);
  }
  if (parts > 1) {  // peers may still be reading this block's shared memory
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

}  // namespace

cudaError_t run_row_stats(const Shard& shard, int64_t topk, Dtype dtype, float* stats,
                          cudaStream_t stream, const Plan& plan) {
  if (shard.rows == 0) return cudaSuccess;
  if (!fits(shard, plan) || topk > kMaxTopk || plan.threads > kThreads)
    return cudaErrorInvalidValue;
  return dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto kernel = topk > 0 ? row_stats_kernel<T, true> : row_stats_kernel<T, false>;
    const auto shared = topk > 0 ? sizeof(SharedWithTop) : sizeof(Shared);
    return launch(kernel, shard.rows, plan, true, shared, stream, shard, topk, plan.parts, stats);
  });
}

cudaError_t launch_row_stats(const Shard& shard, int64_t topk, Dtype dtype, float* stats,
                             cudaStream_t stream) {
  int index;
  Device device;
  const cudaError_t error = current_device(row_stats_kernel<float, false>, index, device);
  if (error != cudaSuccess) return error;
  const int64_t element = dtype == Dtype::kFloat ? 4 : 2;
  return run_row_stats(shard, topk, dtype, stats, stream,
                       row_stats_plan(device, shard.rows, shard.vocab_valid, element));
}

}  // namespace megatron_deft::cuda
