// Sixteen floats at a time: AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include "elements.h"

#define MDEFT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define MDEFT_VEC_FN MDEFT_TARGET static inline __attribute__((always_inline))

namespace megatron_deft::cpu::avx512 {

using Vec = __m512;
constexpr int kWidth = 16;

MDEFT_VEC_FN Vec set1(float x) { return _mm512_set1_ps(x); }
MDEFT_VEC_FN Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
MDEFT_VEC_FN Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
MDEFT_VEC_FN Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
MDEFT_VEC_FN Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Where either is nan, b.
MDEFT_VEC_FN Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
// Bit i: a[i] > b[i], or either is nan.
MDEFT_VEC_FN unsigned not_le(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }

// Bit i: a[i] == b[i].
MDEFT_VEC_FN unsigned equal(Vec a, Vec b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
}
// x, or 0 where a == b.
MDEFT_VEC_FN Vec zero_where_equal(Vec x, Vec a, Vec b) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ), x);
}

MDEFT_VEC_FN void load(const float* p, Vec& a, Vec& b) {
  a = _mm512_loadu_ps(p);
  b = _mm512_loadu_ps(p + kWidth);
}
MDEFT_VEC_FN void store(float* p, Vec a, Vec b) {
  _mm512_storeu_ps(p, a);
  _mm512_storeu_ps(p + kWidth, b);
}
// a: the even elements, b: the odd ones, which saves the shuffles; sums do not mind the order.
MDEFT_VEC_FN void load(const BFloat16* p, Vec& a, Vec& b) {
  const __m512i pairs = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}
// Adds what rounds the upper half to nearest even. A nan that came from bf16 stays one: its lower
// half is 0, so no carry reaches the upper.
MDEFT_VEC_FN __m512i rounded(Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i down = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(down, odd, bits, _mm512_set1_epi32(0x8000));
}
MDEFT_VEC_FN __m512i pairs_of(Vec a, Vec b) {
  const __m512i even = _mm512_srli_epi32(rounded(a), 16);
  return _mm512_ternarylogic_epi32(rounded(b), _mm512_set1_epi32(0xffff0000), even, 0xea);
}
MDEFT_VEC_FN void store(BFloat16* p, Vec a, Vec b) { _mm512_storeu_si512(p, pairs_of(a, b)); }
MDEFT_VEC_FN void load(const Half* p, Vec& a, Vec& b) {
  a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1));
}
MDEFT_VEC_FN void store(Half* p, Vec a, Vec b) {
  __m256i* out = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(out, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(out + 1, _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
}

MDEFT_VEC_FN double sum(Vec v) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}
MDEFT_VEC_FN float largest(Vec v) { return _mm512_reduce_max_ps(v); }

// The largest of n elements, n a multiple of 32; nan may be passed over. As integers, bf16 are
// ordered by value if positive and by reversed value if negative: the signed maximum is right unless
// all are negative, and then the unsigned minimum is.
MDEFT_VEC_FN float largest_of(const BFloat16* p, int64_t n) {
  __m512i signed_max = _mm512_set1_epi16(-32768), unsigned_min = _mm512_set1_epi16(-1);
  for (int64_t i = 0; i < n; i += 2 * kWidth) {
    const __m512i bits = _mm512_loadu_si512(p + i);
    signed_max = _mm512_max_epi16(signed_max, bits);
    unsigned_min = _mm512_min_epu16(unsigned_min, bits);
  }
  uint16_t high[2 * kWidth], low[2 * kWidth];
  _mm512_storeu_si512(high, signed_max);
  _mm512_storeu_si512(low, unsigned_min);
  return largest_bf16(high, low, 2 * kWidth);
}

// poly * 2^n for whole n, 0 where that would be denormal.
MDEFT_VEC_FN Vec times_power_of_two(Vec poly, Vec n, Vec) { return _mm512_scalef_ps(poly, n); }

}  // namespace megatron_deft::cpu::avx512
