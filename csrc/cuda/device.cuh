// Element types and 16-byte vectors of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "ptx.cuh"

namespace megatron_deft::cuda {

using ptx::Vector;

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;  // of a block
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kBatch = 4;  // vectors a thread loads before it uses the first

template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The elements of type T in a 32-bit word.
template <typename T>
struct Word;

template <>
struct Word<float> {
  static constexpr int kElements = 1;
  static constexpr uint32_t kLowest = 0xff800000u;  // -inf
  static __device__ __forceinline__ void unpack(uint32_t w, float* x) { x[0] = bits_as<float>(w); }
  static __device__ __forceinline__ uint32_t pack(const float* x) {
    return bits_as<uint32_t>(x[0]);
  }
  // Elementwise; a nan loses to a number.
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(fmaxf(bits_as<float>(a), bits_as<float>(b)));
  }
};

template <>
struct Word<__nv_bfloat16> {
  static constexpr int kElements = 2;
  static constexpr uint32_t kLowest = 0xff80ff80u;
  static __device__ __forceinline__ void unpack(uint32_t w, float* x) {
    x[0] = bits_as<float>(w << 16);
    x[1] = bits_as<float>(w & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack(const float* x) {
    return bits_as<uint32_t>(__floats2bfloat162_rn(x[0], x[1]));
  }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hmax2(bits_as<__nv_bfloat162>(a), bits_as<__nv_bfloat162>(b)));
  }
};

template <>
struct Word<__half> {
  static constexpr int kElements = 2;
  static constexpr uint32_t kLowest = 0xfc00fc00u;
  static __device__ __forceinline__ void unpack(uint32_t w, float* x) {
    const float2 pair = __half22float2(bits_as<__half2>(w));
    x[0] = pair.x;
    x[1] = pair.y;
  }
  static __device__ __forceinline__ uint32_t pack(const float* x) {
    return bits_as<uint32_t>(__floats2half2_rn(x[0], x[1]));
  }
  static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) {
    return bits_as<uint32_t>(__hmax2(bits_as<__half2>(a), bits_as<__half2>(b)));
  }
};

template <typename T>
constexpr int kPerVector = 16 / sizeof(T);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float x, float* out) { *out = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void from_float(float x, __half* out) { *out = __float2half_rn(x); }

// Calls f(x) for each element of a vector, in order. The loops unroll: nothing is indexed at run
// time.
template <typename T, typename F>
__device__ __forceinline__ void for_each(const Vector& v, F&& f) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float x[Word<T>::kElements];
    Word<T>::unpack(v.word[w], x);
#pragma unroll
    for (int i = 0; i < Word<T>::kElements; ++i) f(x[i]);
  }
}
template <typename T, typename F>
__device__ __forceinline__ Vector map(const Vector& v, F&& f) {
  Vector out;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    float x[Word<T>::kElements];
    Word<T>::unpack(v.word[w], x);
#pragma unroll
    for (int i = 0; i < Word<T>::kElements; ++i) x[i] = f(x[i]);
    out.word[w] = Word<T>::pack(x);
  }
  return out;
}

// Calls `f` with a value of the device type of `dtype`.
template <typename F>
cudaError_t dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat: return f(float{});
    case Dtype::kBFloat16: return f(__nv_bfloat16{});
    case Dtype::kHalf: return f(__half{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace megatron_deft::cuda
