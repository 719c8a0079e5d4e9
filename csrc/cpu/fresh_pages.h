// Large pages for a gradient that is written for the first time.
#pragma once

#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace megatron_deft::cpu {

// A new tensor of 150 MB is 40,000 pages that the kernel zeroes one fault at a time, which takes
// longer than the gradient itself. Asks for pages of 2 MiB instead; where the system refuses, or the
// memory was used before, nothing changes. Not for the in-place form, whose pages are there.
inline void advise_fresh_pages(const at::Tensor& logits, const at::Tensor& out) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  if (out.const_data_ptr() == logits.const_data_ptr()) return;
  const auto begin = reinterpret_cast<uintptr_t>(out.const_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = (begin + out.nbytes()) & ~(kHuge - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace megatron_deft::cpu
