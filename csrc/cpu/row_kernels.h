// One row at a time, in plain loops that the compiler vectorises.
//
// MDEFT_CLONES compiles each loop for AVX-512, AVX2 and the baseline and picks one when the library
// is loaded, so that one build runs everywhere without -march=native.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "../vocab_loss.h"

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#if __GNUC__ >= 12
#define MDEFT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // no x86-64 levels yet; "avx2" alone leaves out fused multiply-add
#define MDEFT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define MDEFT_CLONES
#endif
#define MDEFT_INLINE inline __attribute__((always_inline))

namespace megatron_deft::cpu {

constexpr int64_t kBlock = 512;  // columns converted to fp32 at a time: 2 KiB, stays in L1

MDEFT_INLINE float to_float(float x) { return x; }
MDEFT_INLINE float to_float(c10::BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
MDEFT_INLINE float to_float(c10::Half x) { return c10::detail::fp16_ieee_to_fp32_value(x.x); }

MDEFT_INLINE void from_float(float x, float* out) { *out = x; }
MDEFT_INLINE void from_float(float x, c10::BFloat16* out) {
  // Round to nearest even; nan keeps a set mantissa bit.
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->x = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
MDEFT_INLINE void from_float(float x, c10::Half* out) {
  out->x = c10::detail::fp16_ieee_from_fp32_value(x);
}

// exp for x <= 0, error below 1.5 ulp; 0 below -87.3 (where the result would be denormal), nan for nan.
// Cody-Waite reduction by ln 2 in two parts, then a Taylor polynomial on |r| <= ln(2)/2.
MDEFT_INLINE float exp_nonpositive(float x) {
  const float clamped = x < -87.3f ? -87.3f : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
  const float magic = 12582912.0f;
  const float shifted = clamped * 1.44269504088896341f + magic;
  const float n = shifted - magic;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float poly = 1.0f / 5040.0f;
  poly = poly * r + 1.0f / 720.0f;
  poly = poly * r + 1.0f / 120.0f;
  poly = poly * r + 1.0f / 24.0f;
  poly = poly * r + 1.0f / 6.0f;
  poly = poly * r + 0.5f;
  poly = poly * r + 1.0f;
  poly = poly * r + 1.0f;
  int32_t exponent;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent - 0x4b400000 + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof(power));
  return x < -87.3f ? 0.0f : poly * power;
}

template <typename T>
MDEFT_INLINE float row_max(const T* z, int64_t n) {
  constexpr int kLanes = 32;  // independent maxima, so that the loop is not one chain
  float lanes[kLanes];
  for (int j = 0; j < kLanes; ++j) lanes[j] = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float x = to_float(z[i + j]);
      lanes[j] = x > lanes[j] ? x : lanes[j];
    }
  }
  for (; i < n; ++i) {
    const float x = to_float(z[i]);
    lanes[0] = x > lanes[0] ? x : lanes[0];
  }
  float m = lanes[0];
  for (int j = 1; j < kLanes; ++j) m = lanes[j] > m ? lanes[j] : m;
  return m;
}

// Sums of one row relative to its maximum. fp32 inside a block of lanes, fp64 across blocks: the
// error does not grow with the vocabulary.
template <typename T>
MDEFT_INLINE Sums row_sums(const T* z, int64_t n) {
  constexpr int kLanes = 32;
  const float m = row_max(z, n);
  double s1 = 0, s2 = 0, sh = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = n - begin < kBlock ? n - begin : kBlock;
    float l1[kLanes] = {}, l2[kLanes] = {}, lh[kLanes] = {};
    const auto add = [&](float value, int j) __attribute__((always_inline)) {
      float d = value - m;
      d = d < -100.0f ? -100.0f : d;  // far below the maximum e = 0, and 0 * d must stay 0
      // A shard of -inf alone has m = -inf, where the difference would be nan. nan stays nan.
      d = value == -std::numeric_limits<float>::infinity() ? -100.0f : d;
      const float e = exp_nonpositive(d);
      l1[j] += e;
      l2[j] += e * e;
      lh[j] += e * d;
    };
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int j = 0; j < kLanes; ++j) add(to_float(z[begin + i + j]), j);
    for (; i < count; ++i) add(to_float(z[begin + i]), 0);
    float b1 = 0, b2 = 0, bh = 0;
    for (int j = 0; j < kLanes; ++j) b1 += l1[j], b2 += l2[j], bh += lh[j];
    s1 += b1, s2 += b2, sh += bh;
  }
  return {m, static_cast<float>(s1), static_cast<float>(s2), static_cast<float>(sh)};
}

// out[i] = scale * exp(z[i] - m); z and out may be the same row.
template <typename T>
MDEFT_INLINE void scaled_exp(const T* z, T* out, int64_t n, float m, float scale) {
  // z and out are the same row or do not overlap: no element depends on another.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    // m is the maximum over all shards, so the argument is never positive.
    from_float(scale * exp_nonpositive(to_float(z[i]) - m), out + i);
  }
}

}  // namespace megatron_deft::cpu
