// Element types of the logits and their conversions, one at a time.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace megatron_deft::cpu {

using c10::BFloat16;
using c10::Half;

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
inline float to_float(Half x) { return c10::detail::fp16_ieee_to_fp32_value(x.x); }

inline void from_float(float x, float* out) { *out = x; }
// To nearest even; nan keeps a set mantissa bit.
inline void from_float(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->x = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
inline void from_float(float x, Half* out) { out->x = c10::detail::fp16_ieee_from_fp32_value(x); }

// The largest bf16 of those whose signed maxima are `high` and unsigned minima `low`, n bits each.
inline float largest_bf16(const uint16_t* high, const uint16_t* low, int n) {
  int16_t most = -32768;
  uint16_t least = 0xffff;
  for (int i = 0; i < n; ++i) {
    most = static_cast<int16_t>(high[i]) > most ? static_cast<int16_t>(high[i]) : most;
    least = low[i] < least ? low[i] : least;
  }
  BFloat16 out;
  out.x = most >= 0 ? static_cast<uint16_t>(most) : least;
  return to_float(out);
}

// Puts x into a list of the `topk` largest, largest first, if it is larger than the last; nan is, and
// poisons the list, as it should.
inline void insert_top(float x, float* top, int64_t topk) {
  if (x <= top[topk - 1]) return;
  int64_t at = topk - 1;
  for (; at > 0 && !(x <= top[at - 1]); --at) top[at] = top[at - 1];
  top[at] = x;
}

// Results too small for a normal number become 0 while it lives: exp(-90) would else cost a trap
// into microcode per vector, and rows of logits far below their maximum a hundred times the others.
struct FlushDenormals {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8000u); }
  ~FlushDenormals() { _mm_setcsr(before); }
#else
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
};

}  // namespace megatron_deft::cpu
