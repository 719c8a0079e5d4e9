// Which instruction set's kernels run.
#include "row_kernels.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <cstdlib>
#include <string>

namespace megatron_deft::cpu {
namespace {

enum class Isa { kAvx512, kAvx2, kPlain };
constexpr const char* kNames[] = {"avx512", "avx2", "plain"};

Isa best() {
#if defined(__x86_64__)
  // The builtins look at the operating system's support, too.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return Isa::kAvx2;
#endif
  return Isa::kPlain;
}

Isa choose() {
  const Isa top = best();
  const char* wanted = std::getenv("MEGATRON_DEFT_CPU");
  if (wanted == nullptr || *wanted == '\0') return top;
  for (int i = static_cast<int>(top); i < 3; ++i)
    if (std::string(wanted) == kNames[i]) return static_cast<Isa>(i);
  std::string legal;
  for (int i = static_cast<int>(top); i < 3; ++i) legal += (legal.empty() ? "" : ", ") + std::string(kNames[i]);
  TORCH_CHECK_VALUE(false, "MEGATRON_DEFT_CPU=", wanted, ": legal on this processor: ", legal);
}

Isa chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

const char* instruction_set() { return kNames[static_cast<int>(chosen())]; }

template <typename T>
const RowKernels<T>& row_kernels() {
#if defined(__x86_64__)
  if (chosen() == Isa::kAvx512) return avx512::kernels<T>();
  if (chosen() == Isa::kAvx2) return avx2::kernels<T>();
#endif
  return plain::kernels<T>();
}
template const RowKernels<float>& row_kernels<float>();
template const RowKernels<c10::BFloat16>& row_kernels<c10::BFloat16>();
template const RowKernels<c10::Half>& row_kernels<c10::Half>();

}  // namespace megatron_deft::cpu
