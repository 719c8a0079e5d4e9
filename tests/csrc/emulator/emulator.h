// As much of CUDA as the kernels use, on the CPU: each thread of a cluster is a fiber, and they take
// turns on one real thread, in an order the test chooses.
//
// A fiber runs until it must wait for others. So a missing barrier shows as a result that depends on
// the order, and a barrier that not all threads reach as a deadlock, which is an error. Shared memory
// is a heap block of exactly the size asked for, filled with nan at first and again when its block
// has ended.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim;

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidDevice };
using cudaStream_t = void*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClusterLaunch
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulator {

struct Machine {  // what the kernels are told of the device
  int multiprocessors = 4;
  int shared_per_block = 227 * 1024;
  int clusters = 1;
};
inline Machine machine;

// Who runs next: round robin, or always the first that can, from either end.
enum class Order { kForward, kBackward, kFirst, kLast };
inline Order order = Order::kForward;

void run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::exit(3);
}
inline void check(bool right, const char* what) {
  if (!right) fail(what);
}

void block_barrier();
// What `lane` of the warp gave, where every lane of it gives something.
void exchange(const void* mine, void* theirs, size_t size, unsigned lane);
unsigned lane();

}  // namespace emulator

inline void __syncthreads() { emulator::block_barrier(); }
template <typename T>
T __shfl_sync(unsigned, T x, int lane) {
  T out;
  emulator::exchange(&x, &out, sizeof(T), static_cast<unsigned>(lane) % 32);
  return out;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int offset) {
  return __shfl_sync(mask, x, static_cast<int>(emulator::lane()) ^ offset);
}
inline int atomicAdd(int* p, int x) {
  const int old = *p;
  *p += x;
  return old;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulator::Machine& m = emulator::machine;
  *value = attribute == cudaDevAttrMultiProcessorCount              ? m.multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? m.shared_per_block
                                                                    : m.clusters;
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, Kernel) {
  out->ptxVersion = 90;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Params... params) {
  emulator::run(*config, [&] { kernel(params...); });
  return cudaSuccess;
}
