// Launchers of the CUDA kernels. Free of torch, so that they compile with nvcc alone.
#pragma once

#include <cuda_runtime_api.h>

#include "../vocab_loss.h"

namespace megatron_deft::cuda {

enum class Dtype { kFloat, kBFloat16, kHalf };

// out: [5, rows] fp32
cudaError_t launch_row_stats(const Shard& shard, Dtype dtype, float* out, cudaStream_t stream);
cudaError_t launch_gate_grad(const Shard& shard, const Gradient& gradient, Dtype dtype,
                             cudaStream_t stream);

}  // namespace megatron_deft::cuda
