// Large pages for a gradient that is written for the first time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace megatron_deft::cpu {

// A new tensor of 150 MB is 40,000 pages that the kernel zeroes one fault at a time, which takes
// longer than the gradient itself. Asks for pages of 2 MiB instead; where the system refuses, or the
// memory was used before, nothing changes. Not for the in-place form, whose pages are there.
inline void advise_fresh_pages(uintptr_t begin, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t first = (begin + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = (begin + bytes) & ~(kHuge - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline void advise_fresh_pages(const at::Tensor& logits, const at::Tensor& out) {
  if (out.const_data_ptr() == logits.const_data_ptr()) return;
  advise_fresh_pages(reinterpret_cast<uintptr_t>(out.const_data_ptr()), out.nbytes());
}

}  // namespace megatron_deft::cpu
