// The loops over one row, compiled for each instruction set, and the choice among them.
#pragma once

#include "../vocab_loss.h"

namespace megatron_deft::cpu {

// z, out: `n` elements of type T, n >= 0. z and out are the same row or do not overlap.
template <typename T>
struct RowKernels {
  // The sums of z relative to its maximum; no_sums() for n = 0. `top`: the `topk` largest so
  // far, largest first, brought up to date.
  Sums (*sums)(const T* z, int64_t n, float* top, int64_t topk);
  // out[i] = scale * exp(z[i] - m)
  void (*gradient)(const T* z, T* out, int64_t n, float m, float scale);
  void (*scale)(T* z, int64_t n, float factor);
};

// Three translations of row_kernels.inc.
namespace avx512 {
template <typename T> const RowKernels<T>& kernels();
}
namespace avx2 {
template <typename T> const RowKernels<T>& kernels();
}
namespace plain {
template <typename T> const RowKernels<T>& kernels();
}

// The instruction set in use: "avx512", "avx2" or "plain". Chosen once, by what the processor has;
// the variable MEGATRON_DEFT_CPU names a lesser one, for tests and measurements.
const char* instruction_set();

template <typename T> const RowKernels<T>& row_kernels();

}  // namespace megatron_deft::cpu
