// One read of a slice: its sums and, if asked for, its largest elements. Shared by row_stats and
// row_stats_grad, which differ in where the slice lies.
#pragma once

#include "block_topk.cuh"
#include "row_slice.cuh"
#include "row_sums.cuh"

namespace megatron_deft::cuda {

struct NoTop {
  static constexpr bool kSelects = false;
  __device__ __forceinline__ void add(const Vector (&)[kBatch], float) {}
};

// The thread's sums. Where the source prefetches, the next batch is on its way while one is added;
// not beside a selection, for whose registers other blocks would have to leave.
template <typename T, typename Source, typename Top>
__device__ __forceinline__ ThreadSums reduce(const Source& source, int items, Top& top) {
  ThreadSums sums;
  const int step = kBatch * blockDim.x;
  constexpr bool kPrefetch = Source::kPrefetch && !Top::kSelects;
  Vector next[kBatch];
  if (kPrefetch) source.load(0, next);
  for (int first = 0; first < items; first += step) {
    Vector batch[kBatch];
    if (kPrefetch) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) batch[u] = next[u];
      if (first + step < items) source.load(first + step, next);
    } else {
      source.load(first, batch);
    }
    const float largest = largest_of<T>(batch);
    // whole warps, whose last lanes may hold nothing
    if (first + static_cast<int>(threadIdx.x / kWarp * kWarp) < items)
      add_batch<T>(batch, largest, sums);
    top.add(batch, largest);
  }
  return sums;
}

// What a block knows of its slice before it asks its peers.
struct SliceSums {
  ThreadSums of_thread;
  const float* top;  // sorted, in shared memory; null without kTopk
};

template <bool kTopk, typename T, typename Source, typename Shared>
__device__ __forceinline__ SliceSums reduce_slice(const Source& source, const Slice<T>& slice,
                                                  Shared& shared, int topk) {
  if constexpr (kTopk) {
    BlockTop<T> top(shared.top, topk, slice.count * kPerVector<T> + slice.scalars);
    const ThreadSums of_thread = reduce<T>(source, slice.items(), top);
    return {of_thread, top.finish()};
  } else {
    NoTop top;
    return {reduce<T>(source, slice.items(), top), nullptr};
  }
}

// The target's logit; 0 where another shard holds it.
template <typename T>
__device__ __forceinline__ float target_logit(const T* row, int64_t target) {
  return target >= 0 ? to_float(row[target]) : 0.0f;
}

// Column `row` of stats [5 + topk, rows], by a warp of which lane i holds the i-th largest logit.
__device__ __forceinline__ void store_stats(float* stats, int64_t rows, int64_t row,
                                            const Sums& sums, float z_y, float top, int topk) {
  const int lane = threadIdx.x % kWarp;
  stats += row;
  if (lane == 0) {
    stats[0] = sums.m;
    stats[rows] = sums.rest;
    stats[2 * rows] = sums.s2;
    stats[3 * rows] = sums.sh;
    stats[4 * rows] = z_y;
  }
  if (lane < topk) stats[(kStats + lane) * rows] = top;
}
__device__ __forceinline__ void clear_stats(float* stats, int64_t rows, int64_t row, int topk) {
  for (int i = threadIdx.x; i < kStats + topk; i += blockDim.x) stats[i * rows + row] = 0.0f;
}

}  // namespace megatron_deft::cuda
