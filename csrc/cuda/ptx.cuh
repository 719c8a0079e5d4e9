// Instructions without a CUDA C++ spelling, one small function each. Compiled by anything but nvcc,
// the header of tests/csrc/emulator stands in for them, and the kernels run on the CPU.
#pragma once

#if !defined(__CUDACC__)
#include <emulated_ptx.h>
#else

#include <cstdint>

namespace megatron_deft::cuda::ptx {

// Thread-block clusters, distributed shared memory and bulk copies came with sm_90. Before it a
// cluster is one block, and threads copy for themselves.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MDEFT_SM90 1
constexpr bool kBulkCopies = true;
#else
#define MDEFT_SM90 0
constexpr bool kBulkCopies = false;
#endif

struct alignas(16) Vector {
  uint32_t word[4];
};

__device__ __forceinline__ Vector from_uint4(const uint4& v) { return {{v.x, v.y, v.z, v.w}}; }

// Read once and by this thread alone, of memory that nobody writes meanwhile.
__device__ __forceinline__ Vector load_read_only(const Vector* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return from_uint4(v);
}
// To be read again from L2, of memory that is written later.
__device__ __forceinline__ Vector load_again_later(const Vector* p) {
  return from_uint4(__ldcg(reinterpret_cast<const uint4*>(p)));
}
// For the last time.
__device__ __forceinline__ Vector load_last(const Vector* p) {
  return from_uint4(__ldcs(reinterpret_cast<const uint4*>(p)));
}
// Not read again by the kernel: first to leave the caches.
__device__ __forceinline__ void store_streaming(Vector* p, const Vector& v) {
  __stcs(reinterpret_cast<uint4*>(p), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}

// 2^x to 2 units in the last place; results below 2^-126 are 0.
__host__ __device__ __forceinline__ float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
// The larger; nan if either is.
__host__ __device__ __forceinline__ float max_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return b > a || b != b ? b : a;
#endif
}

// The largest of the warp's, in every lane.
__device__ __forceinline__ int warp_max(int x) { return __reduce_max_sync(0xffffffffu, x); }

// The same value, about which the compiler knows nothing: it computes from it anew instead of keeping
// earlier results in registers.
__device__ __forceinline__ Vector forgotten(Vector v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(v.word[i]));
  return v;
}

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return dynamic_shared;
}
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The variable of block `rank` of the cluster that lies where `p` lies in this block.
template <typename T>
__device__ __forceinline__ const T* of_peer(const T* p, unsigned rank) {
#if MDEFT_SM90
  const T* peer;
  asm("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(p), "r"(rank));
  return peer;
#else
  return p;
#endif
}
// Makes what this thread, or its block before a barrier, wrote visible to who waits.
__device__ __forceinline__ void cluster_arrive() {
#if MDEFT_SM90
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
// Publishes nothing: for a thread whose reads of its peers are over, their values used.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if MDEFT_SM90
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if MDEFT_SM90
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// A barrier in shared memory that bytes arrive at, used for one phase only.
using CopyBarrier = uint64_t;

__device__ __forceinline__ void init_barriers(CopyBarrier* barriers, int n) {
#if MDEFT_SM90
  for (int i = 0; i < n; ++i)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barriers + i))
                 : "memory");
  // visible to the copy engine too
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// All 16-byte aligned. One thread of the block calls it, once for each barrier.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, uint32_t bytes,
                                          CopyBarrier* barrier) {
#if MDEFT_SM90
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
#endif
}
__device__ __forceinline__ void wait_for_copy(CopyBarrier* barrier) {
#if MDEFT_SM90
  uint32_t done = 0;
  while (done == 0)
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier))
        : "memory");
#endif
}
// The same for architectures without bulk copies: each thread its own vectors, then wait, then a
// block barrier.
__device__ __forceinline__ void thread_copy(Vector* to, const Vector* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void wait_for_thread_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace megatron_deft::cuda::ptx

#endif
