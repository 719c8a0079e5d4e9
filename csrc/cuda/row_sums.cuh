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

// A thread's sums. m is the maximum of all its warp has seen; s1 leaves out the elements that equal
// it, `largest` of them, beside which no digit of the others would survive (see Sums::rest).
struct ThreadSums {
  float m = -INFINITY;
  int largest = 0;
  float s1 = 0.0f, s2 = 0.0f, sh = 0.0f;
};

// The same sums relative to a larger maximum, which none of their elements is.
MDEFT_HOST_DEVICE ThreadSums moved_to(const ThreadSums& sums, float m) {
  const float shift = sums.m - m;  // -inf if there were none before
  const float f = shift == -INFINITY ? 0.0f : exp_of<float>(shift);
  const float s1 = sums.s1 + static_cast<float>(sums.largest);
  const float sh = f > 0.0f ? f * (sums.sh + shift * s1) : 0.0f * s1;  // nan stays nan
  return {m, 0, f * s1, f * f * sums.s2, sh};
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
// The largest of a warp, one instruction where threads give whole numbers: floats as integers are in
// order if positive and backwards if negative. nan counts as -inf.
__device__ __forceinline__ float warp_max_number(float x) {
  int bits = bits_as<int>(fmaxf(x, -INFINITY));
  bits = ptx::warp_max(bits < 0 ? bits ^ 0x7fffffff : bits);
  return bits_as<float>(bits < 0 ? bits ^ 0x7fffffff : bits);
}

template <bool kLargest, typename T>
__device__ __forceinline__ void add_exponentials(const Vector (&batch)[kBatch], ThreadSums& sums) {
  const float m = sums.m == -INFINITY ? 0.0f : sums.m;  // -inf - -inf would be nan
  // Summed apart first: fewer roundings of the large running sums.
  float s1 = 0.0f, s2 = 0.0f, sh = 0.0f;
#pragma unroll
  for (int u = 0; u < kBatch; ++u)
    for_each<T>(batch[u], [&](float x) {
      const float d = distance(x, m);
      const float e = exp_of<T>(d);
      if (kLargest && d >= 0.0f) ++sums.largest;
      else s1 += e;
      s2 += e * e;
      sh += e * d;
    });
  sums.s1 += s1;
  sums.s2 += s2;
  sums.sh += sh;
}

// Adds a batch of each lane of a warp, of which `largest` is the lane's maximum. The sums move to a
// new maximum at most once for a batch, all lanes together; then each element costs a subtraction, a
// clamp, a product, an exponential and three sums, and a comparison in the few batches that hold the
// warp's maximum.
template <typename T>
__device__ __forceinline__ void add_batch(const Vector (&batch)[kBatch], float largest,
                                          ThreadSums& sums) {
  const float of_warp = warp_max_number(largest);
  if (of_warp > sums.m) sums = moved_to(sums, of_warp);
  if (of_warp == sums.m && of_warp > -INFINITY) add_exponentials<true, T>(batch, sums);
  else add_exponentials<false, T>(batch, sums);
}

// The sums of a warp's threads, which share m, in every lane.
__device__ __forceinline__ Sums warp_sums(const ThreadSums& sums) {
  const float largest = warp_sum(static_cast<float>(sums.largest));
  return {sums.m, warp_sum(sums.s1) + (largest - 1.0f), warp_sum(sums.s2), warp_sum(sums.sh)};
}

// The union of a warp's parts, one in each lane, in every lane: what a tree of `merge` would give,
// with one exponential instead of ten.
__device__ __forceinline__ Sums warp_sums(const Sums& sums) {
  const float m = warp_max(sums.m);
  const bool highest = sums.m == m;
  const float shift = sums.m - m;  // -inf if the lane has no part
  const float f = highest ? 1.0f : (shift == -INFINITY ? 0.0f : exp_of<float>(shift));
  const float s1 = 1.0f + sums.rest;
  // one largest element is left out of each part of the highest; all but one of them return
  const float rest = warp_sum(highest ? sums.rest : f * s1);
  const float left_out = warp_sum(highest ? 1.0f : 0.0f);
  const float sh = highest ? sums.sh : (f > 0.0f ? f * (sums.sh + shift * s1) : 0.0f * s1);
  return {m, rest + (left_out - 1.0f), warp_sum(f * f * sums.s2), warp_sum(sh)};
}

struct SumsShared {
  Sums of_warp[kMaxWarps];
  Sums of_block;
};

// The cluster's sums in every lane of each block's warp 0; undefined in other warps. Every thread of
// the cluster has arrived when it returns. The caller must see to it that no block ends before its
// peers have read: cluster_arrive after this, cluster_wait before the end (where parts > 1).
__device__ __forceinline__ Sums cluster_sums(const ThreadSums& of_thread, SumsShared& shared,
                                             int parts) {
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
    // Thread 0 publishes for its block, whose writes the barrier puts before its release: a release
    // is a fence of the whole GPU, dear among the streaming stores of other blocks.
    __syncthreads();
    if (threadIdx.x == 0) ptx::cluster_arrive();
    else ptx::cluster_arrive_relaxed();
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
