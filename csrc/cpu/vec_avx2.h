// Eight floats at a time: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include "elements.h"

#define MDEFT_TARGET __attribute__((target("avx2,fma,f16c")))
#define MDEFT_VEC_FN MDEFT_TARGET static inline __attribute__((always_inline))

namespace megatron_deft::cpu::avx2 {

using Vec = __m256;
constexpr int kWidth = 8;

MDEFT_VEC_FN Vec set1(float x) { return _mm256_set1_ps(x); }
MDEFT_VEC_FN Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
MDEFT_VEC_FN Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
MDEFT_VEC_FN Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
MDEFT_VEC_FN Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// Where either is nan, b.
MDEFT_VEC_FN Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
// Bit i: a[i] > b[i], or either is nan.
MDEFT_VEC_FN unsigned not_le(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLE_UQ));
}

// Bit i: a[i] == b[i].
MDEFT_VEC_FN unsigned equal(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
// x, or 0 where a == b.
MDEFT_VEC_FN Vec zero_where_equal(Vec x, Vec a, Vec b) {
  return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ), x);
}

MDEFT_VEC_FN void load(const float* p, Vec& a, Vec& b) {
  a = _mm256_loadu_ps(p);
  b = _mm256_loadu_ps(p + kWidth);
}
MDEFT_VEC_FN void store(float* p, Vec a, Vec b) {
  _mm256_storeu_ps(p, a);
  _mm256_storeu_ps(p + kWidth, b);
}
// a: the even elements, b: the odd ones, which saves the shuffles; sums do not mind the order.
MDEFT_VEC_FN void load(const BFloat16* p, Vec& a, Vec& b) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  b = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000)));
}
// Adds what rounds the upper half to nearest even. A nan that came from bf16 stays one: its lower
// half is 0, so no carry reaches the upper.
MDEFT_VEC_FN __m256i rounded(Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
}
MDEFT_VEC_FN void store(BFloat16* p, Vec a, Vec b) {
  const __m256i even = _mm256_srli_epi32(rounded(a), 16);
  const __m256i pairs = _mm256_blend_epi16(even, rounded(b), 0xaa);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pairs);
}
MDEFT_VEC_FN void load(const Half* p, Vec& a, Vec& b) {
  a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + 1));
}
MDEFT_VEC_FN void store(Half* p, Vec a, Vec b) {
  __m128i* out = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(out, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(out + 1, _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
}

MDEFT_VEC_FN double sum(Vec v) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
  const __m256d four = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}
MDEFT_VEC_FN float largest(Vec v) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// The largest of n elements, n a multiple of 16; nan may be passed over. As integers, bf16 are
// ordered by value if positive and by reversed value if negative: the signed maximum is right unless
// all are negative, and then the unsigned minimum is.
MDEFT_VEC_FN float largest_of(const BFloat16* p, int64_t n) {
  __m256i signed_max = _mm256_set1_epi16(-32768), unsigned_min = _mm256_set1_epi16(-1);
  for (int64_t i = 0; i < n; i += 2 * kWidth) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
    signed_max = _mm256_max_epi16(signed_max, bits);
    unsigned_min = _mm256_min_epu16(unsigned_min, bits);
  }
  uint16_t high[2 * kWidth], low[2 * kWidth];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), signed_max);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), unsigned_min);
  return largest_bf16(high, low, 2 * kWidth);
}

// poly * 2^n for whole n, 0 where that would be denormal. `shifted` holds n in its low bits.
MDEFT_VEC_FN Vec times_power_of_two(Vec poly, Vec n, Vec shifted) {
  const __m256i exponent =
      _mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127 - 0x4b400000));
  const __m256i power = _mm256_slli_epi32(exponent, 23);
  const Vec normal = _mm256_cmp_ps(n, _mm256_set1_ps(-127.0f), _CMP_NLE_UQ);  // nan is, too
  return _mm256_and_ps(normal, _mm256_mul_ps(poly, _mm256_castsi256_ps(power)));
}

}  // namespace megatron_deft::cpu::avx2
