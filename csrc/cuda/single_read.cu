// row_stats_grad: statistics, gate and gradient of a row that is read from memory once.
//
// A row belongs to a cluster of blocks. Each copies its slice into shared memory, sums it, exchanges
// the sums with its peers, evaluates the gate and writes the gradient of its slice: bulk copies run
// ahead of the sums, and blocks of other rows on the same multiprocessor fill the gaps. Where a slice
// does not fit, the same kernel without the copy reads it a second time, from L2 if that is large
// enough (kOnChip = false).
//
// In place, every read for the statistics comes before the exchange and every write after it; in
// between each logit lies in shared memory, or is read again by the thread that overwrites it.
#include "gradient.cuh"
#include "launch.cuh"
#include "row_reduce.cuh"

namespace megatron_deft::cuda {
namespace {

template <bool kOnChip, bool kTopk>
constexpr int kThreads = most_threads(kOnChip, kTopk);
// Of a multiprocessor, at the least. With three, the selection on sm_100 would spill registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocksSelecting = 2;
#else
constexpr int kBlocksSelecting = 3;
#endif
template <bool kOnChip, bool kTopk>
constexpr int kBlocks = kOnChip ? (kTopk ? kBlocksSelecting : 2) : (kTopk ? 2 : 3);
constexpr int kCopies = 8;  // of a slice: summing starts when the first has arrived

struct Shared {
  SumsShared sums;
  RowOut out;
  ptx::CopyBarrier copied[kCopies];
  Vector scalars[2];  // up to 14 elements of 2 bytes, or 6 of 4
};
struct SharedWithTop : Shared {
  TopShared top;
};
template <bool kTopk>
using Memory = std::conditional_t<kTopk, SharedWithTop, Shared>;

// The slice follows, 16-byte aligned.
template <bool kTopk>
constexpr int64_t kOverhead = (sizeof(Memory<kTopk>) + 127) / 128 * 128;

// The items of a slice in shared memory, waiting for each copy where it is first read.
template <typename T>
struct FromShared {
  static constexpr bool kPrefetch = false;
  Slice<T> slice;
  Vector* body;
  Shared& shared;
  int copy;  // vectors of a copy

  __device__ __forceinline__ FromShared(const Slice<T>& slice_, unsigned char* body_,
                                        Shared& shared_)
      : slice(slice_), body(reinterpret_cast<Vector*>(body_)), shared(shared_) {
    const int step = kBatch * blockDim.x;  // of the sums: a copy is whole steps
    copy = ((slice.count + step - 1) / step + kCopies - 1) / kCopies * step;
    if (ptx::kBulkCopies) {
      if (threadIdx.x == 0) {
        ptx::init_barriers(shared.copied, kCopies);
        for (int c = 0, first = 0; first < slice.count; ++c, first += copy) {
          const int n = slice.count - first < copy ? slice.count - first : copy;
          ptx::bulk_copy(body + first, slice.body() + first, n * sizeof(Vector), shared.copied + c);
        }
      }
    } else {
      for (int v = threadIdx.x; v < slice.count; v += blockDim.x)
        ptx::thread_copy(body + v, slice.body() + v);
      ptx::wait_for_thread_copies();
    }
    // after the copies are under way: the thread that asks for them would wait for its scalar
    const int i = threadIdx.x;
    if (i < slice.scalars) reinterpret_cast<T*>(shared.scalars)[i] = slice.scalar(i);
    __syncthreads();
  }

  __device__ __forceinline__ void load(int first, Vector (&batch)[kBatch]) const {
    if (ptx::kBulkCopies && first < slice.count) ptx::wait_for_copy(shared.copied + first / copy);
    const int width = blockDim.x, i = first + threadIdx.x;
    if (i + (kBatch - 1) * width < slice.count) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) batch[u] = body[i + u * width];
      return;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int item = i + u * width;
      if (item < slice.count) batch[u] = body[item];
      else if (item < slice.items()) batch[u] = alone(scalar(item - slice.count));
      else batch[u] = nothing<T>();
    }
  }
  __device__ __forceinline__ Vector vector(int i) const { return body[i]; }
  __device__ __forceinline__ T element(int i) const { return reinterpret_cast<const T*>(body)[i]; }
  __device__ __forceinline__ T scalar(int i) const {
    return reinterpret_cast<const T*>(shared.scalars)[i];
  }
};

template <typename T, bool kOnChip, bool kTopk>
__global__ void __launch_bounds__(kThreads<kOnChip, kTopk>, kBlocks<kOnChip, kTopk>)
    row_stats_grad_kernel(Shard shard, Gate gate, int parts, float* stats, T* out,
                          RowOffsets out_offset) {
  Memory<kTopk>& shared = *reinterpret_cast<Memory<kTopk>*>(ptx::shared_memory());
  const int64_t row = blockIdx.x / static_cast<unsigned>(parts);
  const int part = static_cast<int>(blockIdx.x % static_cast<unsigned>(parts));
  const int64_t thread = static_cast<int64_t>(part) * blockDim.x + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(parts) * blockDim.x;
  const int topk = kTopk ? static_cast<int>(gate.topk) : 0;
  out += out_offset(row);
  if (shard.ignored(row)) {  // all blocks of the cluster: nobody waits for this one
    clear(out, shard.columns, thread, threads);
    if (part == 0) clear_stats(stats, shard.rows, row, topk);
    return;
  }
  const T* z = static_cast<const T*>(shard.logits) + shard.offset(row);
  const int64_t target = shard.target(row);
  const float z_y = threadIdx.x < kWarp ? target_logit(z, target) : 0.0f;

  using Source = std::conditional_t<kOnChip, FromShared<T>, FromGlobal<T, Read::kAgainLater>>;
  const Slice<T> slice(z, shard.vocab_valid, part, parts);
  const Source source = [&] {
    if constexpr (kOnChip)
      return Source(slice, ptx::shared_memory() + kOverhead<kTopk>, shared);
    else
      return Source{slice};
  }();
  const SliceSums slice_sums = reduce_slice<kTopk>(source, slice, shared, topk);
  const Sums sums = cluster_sums(slice_sums.of_thread, shared.sums, parts);
  if (threadIdx.x < kWarp) {
    const float x = kTopk ? cluster_top(slice_sums.top, parts) : 0.0f;
    const float entropy = kTopk ? warp_entropy(x, topk) : 0.0f;
    if (part == 0) store_stats(stats, shard.rows, row, sums, z_y, x, topk);
    if (threadIdx.x == 0) {
      const RowGradient g = gradient_of_row(gate, sums, z_y, entropy);
      shared.out = {sums.m, g.scale, g.target_grad};
    }
  }
  __syncthreads();
  if (parts > 1) ptx::cluster_arrive_relaxed();  // this block has read its peers' shared memory
  const RowOut g = shared.out;
  if constexpr (kOnChip) write_gradient(source, slice, g, target, out);
  else write_gradient(LastRead<T>{slice}, slice, g, target, out);
  clear(out + shard.vocab_valid, shard.columns - shard.vocab_valid, thread, threads);
  if (parts > 1) ptx::cluster_wait();  // and they this block's
}

// More than 48 KB of shared memory must be asked for, once for each kernel and device.
template <auto kernel>
cudaError_t allow_shared_memory(int index, int64_t bytes) {
  static std::atomic<uint64_t> done{0};
  const uint64_t bit = uint64_t{1} << index;
  if (done & bit) return cudaSuccess;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(bytes));
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  if (error == cudaSuccess) done |= bit;
  return error;
}

template <typename T, bool kOnChip, bool kTopk>
cudaError_t run(const Shard& shard, const Gate& gate, float* stats, void* out,
                const RowOffsets& out_offset, cudaStream_t stream, const Plan& plan) {
  constexpr auto kernel = row_stats_grad_kernel<T, kOnChip, kTopk>;
  int64_t bytes = kOverhead<kTopk>;
  if constexpr (kOnChip) {
    const int64_t vectors = shard.vocab_valid * static_cast<int64_t>(sizeof(T)) / 16;
    bytes += divided_up(vectors, plan.parts) * 16;
    int index;
    Device device;
    cudaError_t error = current_device(kernel, index, device);
    if (error == cudaSuccess) error = allow_shared_memory<kernel>(index, device.shared_per_block);
    if (error != cudaSuccess) return error;
  }
  return launch(kernel, shard.rows, plan, true, bytes, stream, shard, gate, plan.parts, stats,
                static_cast<T*>(out), out_offset);
}

}  // namespace

cudaError_t run_row_stats_grad(const Shard& shard, const Gate& gate, Dtype dtype, float* stats,
                               void* out, const RowOffsets& out_offset, cudaStream_t stream,
                               const Plan& plan) {
  if (shard.rows == 0) return cudaSuccess;
  if (!fits(shard, plan) || gate.topk > kMaxTopk ||
      plan.threads > most_threads(plan.on_chip, gate.topk > 0))
    return cudaErrorInvalidValue;
  return dispatch(dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto form = gate.topk > 0 ? (plan.on_chip ? run<T, true, true> : run<T, false, true>)
                                    : (plan.on_chip ? run<T, true, false> : run<T, false, false>);
    return form(shard, gate, stats, out, out_offset, stream, plan);
  });
}

cudaError_t launch_row_stats_grad(const Shard& shard, const Gate& gate, Dtype dtype, float* stats,
                                  void* out, const RowOffsets& out_offset, cudaStream_t stream) {
  int index;
  Device device;
  const cudaError_t error =
      current_device(row_stats_grad_kernel<float, true, false>, index, device);
  if (error != cudaSuccess) return error;
  const int64_t element = dtype == Dtype::kFloat ? 4 : 2;
  const int64_t overhead = gate.topk > 0 ? kOverhead<true> : kOverhead<false>;
  const Plan plan = row_stats_grad_plan(device, shard.rows, shard.vocab_valid, element, overhead,
                                        gate.topk > 0);
  return run_row_stats_grad(shard, gate, dtype, stats, out, out_offset, stream, plan);
}

}  // namespace megatron_deft::cuda
