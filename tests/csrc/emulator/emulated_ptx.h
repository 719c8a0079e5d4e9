// Stands in for csrc/cuda/ptx.cuh.
//
// A bulk copy happens when its barrier is waited for, the last moment at which it may: who reads
// without waiting reads nan.
#pragma once

#include "emulator.h"

namespace megatron_deft::cuda::ptx {

inline bool kBulkCopies = true;

struct alignas(16) Vector {
  uint32_t word[4];
};

inline void check_aligned(const void* p) {
  emulator::check(reinterpret_cast<uintptr_t>(p) % 16 == 0, "an address is not 16-byte aligned");
}
inline Vector load(const Vector* p) {
  check_aligned(p);
  return *p;
}
inline Vector load_read_only(const Vector* p) { return load(p); }
inline Vector load_again_later(const Vector* p) { return load(p); }
inline Vector load_last(const Vector* p) { return load(p); }
inline void store_streaming(Vector* p, const Vector& v) {
  check_aligned(p);
  *p = v;
}

inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float max_nan(float a, float b) { return b > a || b != b ? b : a; }

inline int warp_max(int x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const int other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

inline Vector forgotten(Vector v) { return v; }

unsigned char* shared_memory();
unsigned char* shared_memory_of(unsigned rank);
template <typename T>
const T* of_peer(const T* p, unsigned rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(p) - shared_memory();
  return reinterpret_cast<const T*>(shared_memory_of(rank) + offset);
}
void cluster_arrive();
inline void cluster_arrive_relaxed() { cluster_arrive(); }
void cluster_wait();

using CopyBarrier = uint64_t;
constexpr CopyBarrier kReady = 0x1234, kCopying = 0x1235, kCopied = 0x1236;

inline void init_barriers(CopyBarrier* barriers, int n) {
  for (int i = 0; i < n; ++i) barriers[i] = kReady;
}
void bulk_copy(void* to, const void* from, uint32_t bytes, CopyBarrier* barrier);
void wait_for_copy(CopyBarrier* barrier);
inline void thread_copy(Vector* to, const Vector* from) { *to = load(from); }
inline void wait_for_thread_copies() {}

}  // namespace megatron_deft::cuda::ptx
