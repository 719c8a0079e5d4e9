#pragma once
#include "emulator.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float out;
  if (exponent == 31) out = fraction == 0 ? INFINITY : NAN;
  else if (exponent == 0) out = std::ldexp(static_cast<float>(fraction), -24);
  else out = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return h.bits >> 15 ? -out : out;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // nearbyint rounds to even, as the conversion does; a carry moves into the exponent by itself
  if (size < 0x1p-14f)
    return {static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(size * 0x1p24f)))};
  int exponent;
  const float fraction = std::frexp(size, &exponent);  // in [0.5, 1)
  const int rounded = static_cast<int>(std::nearbyint(fraction * 2048.0f));
  return {static_cast<uint16_t>(sign | ((exponent + 13) * 1024 + rounded))};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) {
  return __floats2half2_rn(fmaxf(__half2float(a.x), __half2float(b.x)),
                           fmaxf(__half2float(a.y), __half2float(b.y)));
}
