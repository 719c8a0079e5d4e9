// From logits to gradient, wherever the logits of a slice lie.
#pragma once

#include "row_slice.cuh"
#include "row_sums.cuh"

namespace megatron_deft::cuda {

struct RowOut {
  float m;            // of the whole row
  float scale;        // gate / S1, times what came from upstream
  float target_grad;  // the target's entry, free of the cancellation of p - 1
};

template <typename T>
MDEFT_HOST_DEVICE float gradient_at(float z, const RowOut& g) {
  return g.scale * exp_of<T>(distance(z, g.m));
}

// Logits of a slice in global memory, read for the last time and perhaps about to be overwritten: a
// thread writes only what it alone has read.
template <typename T>
struct LastRead {
  const Slice<T>& slice;
  __device__ __forceinline__ Vector vector(int i) const { return ptx::load_last(slice.body() + i); }
  __device__ __forceinline__ T element(int i) const { return slice.row[slice.column_of(0) + i]; }
  __device__ __forceinline__ T scalar(int i) const { return slice.scalar(i); }
};

// Writes the slice's part of the row `out`. Where `out` is aligned as the logits are, which it is in
// place and for contiguous tensors, in vectors; elsewhere element by element.
template <typename T, typename Logits>
__device__ __forceinline__ void write_gradient(const Logits& logits, const Slice<T>& slice,
                                               const RowOut& g, int64_t target, T* out) {
  const int width = blockDim.x;
  T* body = out + slice.column_of(0);
  if (reinterpret_cast<uintptr_t>(body) % 16 == 0) {
    const int64_t hit = target < 0 ? -1 : slice.vector_of(target);
    for (int first = threadIdx.x; first < slice.count; first += kBatch * width) {
      Vector batch[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (first + u * width < slice.count) batch[u] = logits.vector(first + u * width);
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int i = first + u * width;
        if (i >= slice.count) break;
        ptx::store_streaming(reinterpret_cast<Vector*>(body) + i,
                             map<T>(batch[u], [&](float z) { return gradient_at<T>(z, g); }));
        if (i == hit) from_float(g.target_grad, out + target);  // the same thread, hence after
      }
    }
  } else {
    for (int i = threadIdx.x; i < slice.count * kPerVector<T>; i += width) {
      const bool hit = slice.column_of(0) + i == target;
      from_float(hit ? g.target_grad : gradient_at<T>(to_float(logits.element(i)), g), body + i);
    }
  }
  for (int i = threadIdx.x; i < slice.scalars; i += width) {
    const int column = slice.scalar_column(i);
    const float z = to_float(logits.scalar(i));
    from_float(column == target ? g.target_grad : gradient_at<T>(z, g), out + column);
  }
}

}  // namespace megatron_deft::cuda
