// What the CPU and the CUDA kernels share: parameters, shapes and the arithmetic of one row.
//
// A row is the logits of one token over this rank's slice of the vocabulary. Two kernels serve every
// objective:
//   row_stats       logits -> (m, S1, S2, Sh, z_y, top k)   one read
//   gate_grad       logits -> coeff * (p_i - 1[i = y])      one read, one write
// and where the vocabulary is whole and the upstream gradient known, one alone:
//   row_stats_grad  logits -> both, the row staying on chip  one read, one write
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MDEFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MDEFT_HOST_DEVICE inline
#endif

namespace megatron_deft {

constexpr int kStats = 5;  // m, S1, S2, Sh, z_y
constexpr int64_t kMaxTopk = 32;

// One shard of logits and its labels.
//   logits: [rows, columns] with unit column stride and `row_stride` elements between rows
//   labels: [rows], global vocabulary indices or ignore_index
struct Shard {
  const void* logits;
  const int64_t* labels;
  int64_t rows;
  int64_t columns;      // V_local, padding included
  int64_t row_stride;   // elements
  int64_t vocab_start;  // global index of column 0
  int64_t vocab_valid;  // real columns: [0, vocab_valid); the rest is padding
  int64_t ignore_index;

  // Column of the target in this shard, or -1 when another shard owns it.
  MDEFT_HOST_DEVICE int64_t target(int64_t row) const {
    const int64_t column = labels[row] - vocab_start;
    return column >= 0 && column < vocab_valid ? column : -1;
  }
  MDEFT_HOST_DEVICE bool ignored(int64_t row) const { return labels[row] == ignore_index; }
};

// Output of gate_grad and its per-row inputs, each [rows] fp32.
struct Gradient {
  void* out;  // may be Shard::logits
  int64_t row_stride;
  const float* row_max;      // over the whole vocabulary
  const float* scale;        // coeff / S1
  const float* target_grad;  // coeff * expm1(logp)
};

// Running sums over part of a row, relative to their own maximum m.
struct Sums {
  float m, s1, s2, sh;
};

// The sums of the union of two parts. Every shape of reduction (thread, warp, block, tensor-parallel
// rank) is built from this one function, so that they cannot disagree.
MDEFT_HOST_DEVICE Sums merge(const Sums& a, const Sums& b) {
  if (a.s1 == 0.0f) return b;  // an empty part has m = -inf; -inf - -inf would be nan
  if (b.s1 == 0.0f) return a;
  const float m = a.m > b.m ? a.m : b.m;
  const float fa = expf(a.m - m), fb = expf(b.m - m);
  Sums out;
  out.m = m;
  out.s1 = fa * a.s1 + fb * b.s1;
  out.s2 = fa * fa * a.s2 + fb * fb * b.s2;
  // f * (sh + (m_part - m) * s1): where f is 0 the shift may be infinite, and the term is 0.
  out.sh = (fa > 0.0f ? fa * (a.sh + (a.m - m) * a.s1) : 0.0f) +
           (fb > 0.0f ? fb * (b.sh + (b.m - m) * b.s1) : 0.0f);
  return out;
}

}  // namespace megatron_deft
