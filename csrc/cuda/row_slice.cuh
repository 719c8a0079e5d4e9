// Which part of a row a block reads, in 16-byte vectors.
//
// A row may start anywhere. Its body is cut into aligned vectors; the few elements before and after
// the body are the row's scalars. A slice is a range of the body, plus the scalars for the first
// block of a row. Its items are its vectors and then its scalars, each of those alone in a vector
// that is filled up with -inf: one loop over items serves any alignment, and -inf changes no sum.
#pragma once

#include "device.cuh"

namespace megatron_deft::cuda {

template <typename T>
struct Slice {
  const T* row;
  int columns;
  int head;     // scalars before the body
  int begin;    // first vector of this block
  int count;    // vectors of this block
  int scalars;  // of this block: all of the row's, or none

  // The part-th of `parts` slices of row[0, columns).
  __device__ __forceinline__ Slice(const T* row_, int64_t columns_, int part, int parts)
      : row(row_), columns(static_cast<int>(columns_)) {
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    const int missing = past == 0 ? 0 : kPerVector<T> - past;
    head = missing < columns ? missing : columns;
    const int vectors = (columns - head) / kPerVector<T>;
    const int each = (vectors + parts - 1) / parts;
    begin = part * each < vectors ? part * each : vectors;
    count = vectors - begin < each ? vectors - begin : each;
    scalars = part == 0 ? columns - vectors * kPerVector<T> : 0;
  }

  __device__ __forceinline__ int items() const { return count + scalars; }
  __device__ __forceinline__ const Vector* body() const {
    return reinterpret_cast<const Vector*>(row + head) + begin;
  }
  // Column of the first element of vector i of this block.
  __device__ __forceinline__ int column_of(int i) const {
    return head + (begin + i) * kPerVector<T>;
  }
  __device__ __forceinline__ int scalar_column(int i) const {
    return i < head ? i : columns - scalars + i;
  }
  __device__ __forceinline__ T scalar(int i) const { return row[scalar_column(i)]; }
  // The vector of this block that holds a column; out of 0 to count if none does.
  __device__ __forceinline__ int64_t vector_of(int64_t column) const {
    return column < head ? -1 : (column - head) / kPerVector<T> - begin;
  }
};

template <typename T>
__device__ __forceinline__ Vector nothing() {
  constexpr uint32_t w = Word<T>::kLowest;
  return {{w, w, w, w}};
}
template <typename T>
__device__ __forceinline__ Vector alone(T x) {
  Vector v = nothing<T>();
  memcpy(v.word, &x, sizeof(T));
  return v;
}

enum class Read { kOnly, kAgainLater };

// The items of a slice in global memory. kOnly: nobody writes the logits in this kernel.
template <typename T, Read kRead>
struct FromGlobal {
  static constexpr bool kPrefetch = true;
  Slice<T> slice;

  static __device__ __forceinline__ Vector load(const Vector* p) {
    return kRead == Read::kOnly ? ptx::load_read_only(p) : ptx::load_again_later(p);
  }
  // The thread's items first + threadIdx.x + 0, 1, .. kBatch - 1 block widths.
  __device__ __forceinline__ void load(int first, Vector (&batch)[kBatch]) const {
    const int width = blockDim.x, i = first + threadIdx.x;
    const Vector* body = slice.body();
    if (i + (kBatch - 1) * width < slice.count) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) batch[u] = load(body + i + u * width);
      return;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int item = i + u * width;
      if (item < slice.count) batch[u] = load(body + item);
      else if (item < slice.items()) batch[u] = alone(slice.scalar(item - slice.count));
      else batch[u] = nothing<T>();
    }
  }
};

// Zeros in p[0, n), as thread `thread` of `threads` that share the work.
template <typename T>
__device__ __forceinline__ void clear(T* p, int64_t n, int64_t thread, int64_t threads) {
  const Slice<T> whole(p, n, 0, 1);
  for (int64_t i = thread; i < whole.count; i += threads)
    ptx::store_streaming(reinterpret_cast<Vector*>(p + whole.head) + i, Vector{{0, 0, 0, 0}});
  for (int64_t i = thread; i < whole.scalars; i += threads)
    from_float(0.0f, p + whole.scalar_column(static_cast<int>(i)));
}

}  // namespace megatron_deft::cuda
