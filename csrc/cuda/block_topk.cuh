// The k largest elements of a slice, found while it is read.
//
// A threshold filters: at least k elements seen so far are not below it, and all seen elements above
// it are in a buffer in shared memory. So the k largest are those of the buffer, filled up with the
// threshold, in whatever order the threads appended. A batch costs a thread one comparison, of its
// maximum, while nothing passes. When too much passes, the k-th largest of the threads' maxima is a
// better threshold: fewer than k threads hold anything above it, so that the buffer cannot overflow
// again, whatever the row holds.
#pragma once

#include "row_sums.cuh"

namespace megatron_deft::cuda {

constexpr int kTopCapacity = 2048;

struct TopShared {
  float lists[kMaxWarps][kWarp];  // sorted, one for each warp
  float buffer[kTopCapacity];
  int added[3];
};

// Sorted lists of a warp, a value in each lane, largest first.
__device__ __forceinline__ float exchange(float x, int offset, bool keep_larger) {
  const float other = __shfl_xor_sync(0xffffffffu, x, offset);
  return keep_larger ? fmaxf(x, other) : fminf(x, other);
}
__device__ __forceinline__ float sorted(float x) {  // bitonic
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int size = 2; size <= kWarp; size *= 2)
#pragma unroll
    for (int offset = size / 2; offset > 0; offset /= 2)
      x = exchange(x, offset, ((lane & offset) == 0) == ((lane & size) == 0));
  return x;
}
// The 32 largest of two lists, the second given backwards (its smallest in lane 0).
__device__ __forceinline__ float joined(float x, float backwards) {
  const int lane = threadIdx.x % kWarp;
  x = fmaxf(x, backwards);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x = exchange(x, offset, (lane & offset) == 0);
  return x;
}

template <typename T>
class BlockTop {
 public:
  static constexpr bool kSelects = true;

  // All threads of the block call every function. `elements`: in the slice.
  __device__ BlockTop(TopShared& shared, int topk, int elements)
      : shared_(shared), topk_(topk), many_(elements > kTopCapacity) {
    if (threadIdx.x < 3) shared_.added[threadIdx.x] = 0;
    __syncthreads();
  }

  __device__ void add(const Vector (&batch)[kBatch], float largest) {
    constexpr int kMostAgain = (kMaxTopk - 1) * kBatch * kPerVector<T>;
    static_assert(kMaxTopk == kWarp && kMostAgain + kWarp <= kTopCapacity);
    // The first batch of a long row would all pass: there the maxima come first.
    int added = many_ ? kTopCapacity + 1 : append(batch, largest);
    many_ = false;
    if (settled_ + added > kTopCapacity) {
      join_lists(sorted(largest));
      threshold_ = fmaxf(threshold_, shared_.lists[0][topk_ - 1]);
      added = append(batch, largest);
    }
    settled_ += added;
    if (settled_ > kTopCapacity - kMostAgain) select();
  }

  // The sorted list of the block, 32 values of which the first topk count, in shared memory.
  __device__ const float* finish() {
    select();
    return shared_.lists[0];
  }

 private:
  // Appends what is above the threshold; how much that was. More than fits is counted, but dropped.
  __device__ int append(const Vector (&batch)[kBatch], float largest) {
    if (largest > threshold_) {
      int mine = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        for_each<T>(batch[u], [&](float x) { mine += x > threshold_ ? 1 : 0; });
      int at = settled_ + atomicAdd(&shared_.added[slot_], mine);
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        for_each<T>(ptx::forgotten(batch[u]), [&](float x) {
          if (x > threshold_) {
            if (at < kTopCapacity) shared_.buffer[at] = x;
            ++at;
          }
        });
    }
    __syncthreads();
    // Three counters in turn: all threads have read the one before this barrier's, and nobody adds
    // to it before the next barrier.
    const int added = shared_.added[slot_];
    if (threadIdx.x == 0) shared_.added[(slot_ + 2) % 3] = 0;
    slot_ = (slot_ + 1) % 3;
    return added;
  }

  // Leaves the k largest of the buffer in it and in lists[0].
  __device__ void select() {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, width = blockDim.x;
    float list = threshold_;
    for (int first = warp * kWarp; first < settled_; first += width) {
      const float x = first + lane < settled_ ? shared_.buffer[first + lane] : threshold_;
      list = joined(list, -sorted(-x));  // backwards
    }
    join_lists(list);
    threshold_ = shared_.lists[0][topk_ - 1];
    const int i = threadIdx.x;
    if (i < topk_) shared_.buffer[i] = shared_.lists[0][i];
    settled_ = topk_;
    __syncthreads();
  }

  // The union of the warps' lists in lists[0], for all to read.
  __device__ void join_lists(float list) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    shared_.lists[warp][lane] = list;
    for (int n = blockDim.x / kWarp; n > 1;) {
      const int half = (n + 1) / 2;
      __syncthreads();
      if (warp < n - half) {
        list = joined(list, shared_.lists[warp + half][kWarp - 1 - lane]);
        shared_.lists[warp][lane] = list;
      }
      n = half;
    }
    __syncthreads();
  }

  TopShared& shared_;
  int topk_;
  float threshold_ = -INFINITY;
  int settled_ = 0;  // entries of the buffer, the same in all threads
  int slot_ = 0;
  bool many_;
};

// The cluster's sorted list, lane by lane, in warp 0. After cluster_sums, which makes the peers'
// lists visible.
__device__ __forceinline__ float cluster_top(const float* list, int parts) {
  const int lane = threadIdx.x % kWarp;
  float x = list[lane];
  if (parts == 1) return x;
  x = -INFINITY;
  for (int part = 0; part < parts; ++part)
    x = joined(x, *ptx::of_peer(list + kWarp - 1 - lane, part));
  return x;
}

// entropy_of (gate.h), an element in each lane: lane i holds the i-th largest.
__device__ __forceinline__ float warp_entropy(float x, int topk) {
  const int lane = threadIdx.x % kWarp;
  const float d = x - __shfl_sync(0xffffffffu, x, 0);
  const float e = lane < topk ? expf(d) : 0.0f;
  const float others = warp_sum(lane > 0 ? e : 0.0f);
  return log1pf(others) - warp_sum(e != 0.0f ? e * d : 0.0f) / (1.0f + others);
}

}  // namespace megatron_deft::cuda
