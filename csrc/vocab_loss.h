// What the CPU and the CUDA kernels share: parameters, shapes and the arithmetic of one row.
//
// A row is the logits of one token over this rank's slice of the vocabulary. Two kernels serve every
// objective:
//   row_stats       logits -> (m, S1 - 1, S2, Sh, z_y, top k)   one read
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

constexpr int kStats = 5;  // m, S1 - 1, S2, Sh, z_y
constexpr int64_t kMaxTopk = 32;

// Where the rows of a tensor [..., V] begin, in elements: `stride` apart, or in runs of `run` rows
// that are `run_stride` apart, such as the views z[:, :-1] and z.transpose(0, 1).
struct RowOffsets {
  int64_t stride;
  int64_t run = INT64_MAX;
  int64_t run_stride = 0;

  MDEFT_HOST_DEVICE int64_t operator()(int64_t row) const {
    if (row < run) return row * stride;  // without a division
#ifdef __CUDA_ARCH__  // a grid has fewer rows than 2^32; dividing 64 bits takes registers
    const uint32_t outer = static_cast<uint32_t>(row) / static_cast<uint32_t>(run);
#else
    const int64_t outer = row / run;
#endif
    return outer * run_stride + (row - outer * run) * stride;
  }
};

// One shard of logits and its labels.
//   logits: [rows, columns] with unit column stride, the rows where `offset` says
//   labels: [rows], global vocabulary indices or ignore_index
struct Shard {
  const void* logits;
  const int64_t* labels;
  int64_t rows;
  int64_t columns;      // V_local, padding included
  RowOffsets offset;
  int64_t vocab_start;  // global index of column 0
  int64_t vocab_valid;  // real columns: [0, vocab_valid); the rest is padding
  int64_t ignore_index;

  // Column of the target in this shard, or -1 when another shard owns it.
  MDEFT_HOST_DEVICE int64_t target(int64_t row) const {
    const int64_t label = labels[row];  // anything: label - vocab_start may overflow below
    return label >= vocab_start && label - vocab_start < vocab_valid ? label - vocab_start : -1;
  }
  MDEFT_HOST_DEVICE bool ignored(int64_t row) const { return labels[row] == ignore_index; }
};

// Output of gate_grad and its per-row inputs, each [rows] fp32.
struct Gradient {
  void* out;  // may be Shard::logits
  RowOffsets offset;
  const float* row_max;      // over the whole vocabulary
  const float* scale;        // coeff / S1
  const float* target_grad;  // coeff * expm1(logp)
};

// Running sums over part of a row, relative to their own maximum m, with e = exp(z - m).
//
// `rest` is the sum of e without one largest element, whose e is 1: S1 = 1 + rest. Where the model is
// sure of a token, rest is far below the last digit of S1, and all of log p = -log1p(rest), of the
// entropy and of the target's gradient hangs on it.
struct Sums {
  float m, rest, s2, sh;
};

MDEFT_HOST_DEVICE Sums no_sums() { return {-INFINITY, -1.0f, 0.0f, 0.0f}; }

// The sums of the union of two parts. Every shape of reduction (thread, warp, block, tensor-parallel
// rank) follows this one function, so that they cannot disagree.
MDEFT_HOST_DEVICE Sums merge(const Sums& a, const Sums& b) {
  const bool swap = b.m > a.m || b.m != b.m;  // a maximum of nan stays one
  const Sums &high = swap ? b : a, &low = swap ? a : b;
  const float shift = low.m - high.m;  // nan where both are empty
  const float f = low.m == -INFINITY ? 0.0f : expf(shift);
  const float s1 = 1.0f + low.rest;
  // Where f is 0 the shift may be infinite, and the terms are 0; a nan stays one.
  const float nothing = 0.0f * low.s2;
  return {high.m, high.rest + (f > 0.0f ? f * s1 : nothing), high.s2 + f * f * low.s2,
          high.sh + (f > 0.0f ? f * (low.sh + shift * s1) : nothing)};
}

}  // namespace megatron_deft
