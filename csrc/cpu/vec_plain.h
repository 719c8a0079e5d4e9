// Four floats at a time in the vector types of GCC and Clang, for any machine: SSE2, NEON, or plain
// arithmetic where there is neither.
#pragma once

#include "elements.h"

#define MDEFT_TARGET
#define MDEFT_VEC_FN static inline

namespace megatron_deft::cpu::plain {

constexpr int kWidth = 4;
using Vec = float __attribute__((vector_size(16)));
using Bits = int32_t __attribute__((vector_size(16)));

MDEFT_VEC_FN Vec set1(float x) { return Vec{x, x, x, x}; }
MDEFT_VEC_FN Vec add(Vec a, Vec b) { return a + b; }
MDEFT_VEC_FN Vec sub(Vec a, Vec b) { return a - b; }
MDEFT_VEC_FN Vec mul(Vec a, Vec b) { return a * b; }
MDEFT_VEC_FN Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// Where either is nan, b.
MDEFT_VEC_FN Vec max(Vec a, Vec b) { return a > b ? a : b; }
// Bit i: a[i] > b[i], or either is nan.
MDEFT_VEC_FN unsigned not_le(Vec a, Vec b) {
  const Bits le = a <= b;
  return 0xfu & ~((le[0] & 1u) | (le[1] & 2u) | (le[2] & 4u) | (le[3] & 8u));
}

// Bit i: a[i] == b[i].
MDEFT_VEC_FN unsigned equal(Vec a, Vec b) {
  const Bits eq = a == b;
  return (eq[0] & 1u) | (eq[1] & 2u) | (eq[2] & 4u) | (eq[3] & 8u);
}
// x, or 0 where a == b.
MDEFT_VEC_FN Vec zero_where_equal(Vec x, Vec a, Vec b) {
  return a == b ? set1(0.0f) : x;
}

template <typename T>
MDEFT_VEC_FN void load(const T* p, Vec& a, Vec& b) {
  for (int i = 0; i < kWidth; ++i) a[i] = to_float(p[i]);
  for (int i = 0; i < kWidth; ++i) b[i] = to_float(p[kWidth + i]);
}
template <typename T>
MDEFT_VEC_FN void store(T* p, Vec a, Vec b) {
  for (int i = 0; i < kWidth; ++i) from_float(a[i], p + i);
  for (int i = 0; i < kWidth; ++i) from_float(b[i], p + kWidth + i);
}
// Where the bytes come in order, eight bf16 are the halves of four words: even ones low, odd high.
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
MDEFT_VEC_FN void load(const BFloat16* p, Vec& a, Vec& b) {
  using Words = uint32_t __attribute__((vector_size(16)));
  Words pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  a = reinterpret_cast<Vec>(pairs << 16);
  b = reinterpret_cast<Vec>(pairs & 0xffff0000u);
}
MDEFT_VEC_FN void store(BFloat16* p, Vec a, Vec b) {
  using Words = uint32_t __attribute__((vector_size(16)));
  const Words even = reinterpret_cast<Words>(a), odd = reinterpret_cast<Words>(b);
  // Adds what rounds the upper half to nearest even. A nan that came from bf16 stays one: its lower
  // half is 0, so no carry reaches the upper.
  const Words low = (even + 0x7fffu + ((even >> 16) & 1u)) >> 16;
  const Words high = (odd + 0x7fffu + ((odd >> 16) & 1u)) & 0xffff0000u;
  const Words pairs = low | high;
  std::memcpy(static_cast<void*>(p), &pairs, sizeof(pairs));
}
#endif

MDEFT_VEC_FN double sum(Vec v) {
  return (static_cast<double>(v[0]) + v[1]) + (static_cast<double>(v[2]) + v[3]);
}
MDEFT_VEC_FN float largest(Vec v) {
  float out = v[0];
  for (int i = 1; i < kWidth; ++i) out = v[i] > out ? v[i] : out;
  return out;
}

// poly * 2^n for whole n, 0 where that would be denormal. `shifted` holds n in its low bits.
MDEFT_VEC_FN Vec times_power_of_two(Vec poly, Vec n, Vec shifted) {
  const Bits power = (reinterpret_cast<Bits>(shifted) + (127 - 0x4b400000)) << 23;
  const Vec out = poly * reinterpret_cast<Vec>(power);
  return n <= -127.0f ? set1(0.0f) : out;
}

}  // namespace megatron_deft::cpu::plain
