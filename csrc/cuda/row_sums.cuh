// The online softmax: sums of a thread, a warp, a block, a cluster.
//
// All orders of addition are fixed, so that the bits are the same from run to run.
#pragma once

#include "device.cuh"

namespace megatron_deft::cuda {

constexpr double kLog2eExact = 1.44269504088896341;
constexpr float kLog2e = static_cast<float>(kLog2eExact);
constexpr float kLog2eRest = static_cast<float>(kLog2eExact - kLog2e);
constexpr float kLn2 = 0.693147181f;
// exp of it is 0, and 0 times it is 0, unlike 0 * -inf.
constexpr float kFarBelow = -1000.0f;

// e^d for d = z - m. The difference is exact or close to it before it is multiplied; z * log2(e) -
// m * log2(e) would lose 1e-4 at |z| = 1000. The product's rounding costs |d| * 6e-8 of e, well below
// what 16-bit logits lost when they were made; for fp32 ones it is mended.
template <typename T>
MDEFT_HOST_DEVICE float exp_of(float d) {
  const float x = d * kLog2e;
  const float e = ptx::exp2_approx(x);
  if constexpr (sizeof(T) < 4) return e;
  const float rest = fmaf(d, kLog2eRest, fmaf(d, kLog2e, -x));
  return fmaf(e * kLn2, rest, e);
}

// z - m, of which e^d and e^d * d are finite; nan stays nan.
MDEFT_HOST_DEVICE float distance(float z, float m) { return ptx::max_nan(z - m, kFarBelow); }

MDEFT_HOST_DEVICE Sums no_sums() { return {-INFINITY, 0.0f, 0.0f, 0.0f}; }

// The same sums relative to the maximum `m`, not below their own.
MDEFT_HOST_DEVICE Sums moved_to(const Sums& sums, float m) {
  if (sums.m == m) return sums;
  const float shift = sums.m - m;  // -inf if there were none before
  const float f = shift == -INFINITY ? 0.0f : exp_of<float>(shift);
  const float sh = f > 0.0f ? f * (sums.sh + shift * sums.s1) : 0.0f * sums.s1;  // nan stays nan
  return {m, f * sums.s1, f * f * sums.s2, sh};
}

template <typename T>
__device__ __forceinline__ float largest_of(const Vector (&batch)[kBatch]) {
  uint32_t largest = batch[0].word[0];
#pragma unroll
  for (int i = 1; i < 4 * kBatch; ++i)
    largest = Word<T>::max(largest, batch[i / 4].word[i % 4]);
  float x[Word<T>::kElements];
  Word<T>::unpack(largest, x);
  return Word<T>::kElements == 1 ? x[0] : fmaxf(x[0], x[Word<T>::kElements - 1]);
}

// Adds a batch whose maximum is known. The sums move to a new maximum at most once for the whole
// batch; then each element costs a subtraction, a clamp, a product, an exponential and three sums.
template <typename T>
__device__ __forceinline__ void add_batch(const Vector (&batch)[kBatch], float largest, Sums& sums) {
  if (largest > sums.m) sums = moved_to(sums, largest);
  const float m = sums.m == -INFINITY ? 0.0f : sums.m;  // -inf - -inf would be nan
  // Summed apart first: fewer roundings of the large running sums.
  float s1 = 0.0f, s2 = 0.0f, sh = 0.0f;
#pragma unroll
  for (int u = 0; u < kBatch; ++u)
    for_each<T>(batch[u], [&](float x) {
      const float d = distance(x, m);
      const float e = exp_of<T>(d);
      s1 += e;
      s2 += e * e;
      sh += e * d;
    });
  sums.s1 += s1;
  sums.s2 += s2;
  sums.sh += sh;
}

// Butterflies: every lane has the result, and a + b = b + a makes it the same bits.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
// One exponential for each lane; a tree of `merge` would need ten.
__device__ __forceinline__ Sums warp_sums(const Sums& sums) {
  const Sums own = moved_to(sums, warp_max(sums.m));
  return {own.m, warp_sum(own.s1), warp_sum(own.s2), warp_sum(own.sh)};
}

struct SumsShared {
  Sums of_warp[kMaxWarps];
  Sums of_block;
};

// The cluster's sums in every lane of each block's warp 0; undefined in other warps. Every thread of
// the cluster has arrived when it returns. The caller must see to it that no block ends before its
// peers have read: cluster_arrive after this, cluster_wait before the end (where parts > 1).
__device__ __forceinline__ Sums cluster_sums(const Sums& of_thread, SumsShared& shared, int parts) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Sums of_warp = warp_sums(of_thread);
  if (lane == 0) shared.of_warp[warp] = of_warp;
  __syncthreads();
  Sums sums = no_sums();
  if (warp == 0) {
    if (lane * kWarp < static_cast<int>(blockDim.x)) sums = shared.of_warp[lane];
    sums = warp_sums(sums);
    if (parts > 1 && lane == 0) shared.of_block = sums;
  }
  if (parts > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (warp == 0) {
      sums = no_sums();
      if (lane < parts) sums = *ptx::of_peer(&shared.of_block, lane);
      sums = warp_sums(sums);
    }
  }
  return sums;
}

}  // namespace megatron_deft::cuda
