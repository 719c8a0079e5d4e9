// What every launch needs of the host: the device's limits, and one way to start a kernel.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <climits>

#include "plan.h"

namespace megatron_deft::cuda {

// Asked of the driver once for each device. `kernel`: any, to tell what the code was compiled for:
// compiled for sm_80 it runs on sm_90 too, but knows of no clusters.
template <typename Kernel>
cudaError_t current_device(Kernel* kernel, int& index, Device& out) {
  constexpr int kDevices = 64;
  struct Slot {
    std::atomic<bool> known{false};
    std::atomic<int> multiprocessors, shared, clusters;
  };
  static std::array<Slot, kDevices> slots;
  if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
  if (index < 0 || index >= kDevices) return cudaErrorInvalidDevice;
  Slot& slot = slots[index];
  if (!slot.known) {
    int multiprocessors = 0, shared = 0, clusters = 0;
    cudaError_t error =
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index);
    cudaFuncAttributes code{};
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, kernel);
    if (error != cudaSuccess) return error;
    slot.multiprocessors = multiprocessors;
    slot.shared = shared;
    slot.clusters = clusters != 0 && code.ptxVersion >= 90;
    slot.known = true;
  }
  out = {slot.multiprocessors, slot.shared, slot.clusters != 0};
  return cudaSuccess;
}

// Columns and vectors of a row are counted in int; the rows' addresses in 64 bits.
inline bool fits(const Shard& shard, const Plan& plan) {
  return shard.columns <= INT_MAX - 4096 && shard.rows * plan.parts <= kMaxGrid;
}

// Starts plan.parts blocks for each row, as clusters if `clustered`.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t rows, const Plan& plan, bool clustered,
                   int64_t shared_bytes, cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows * plan.parts));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(plan.parts);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = clustered && plan.parts > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace megatron_deft::cuda
