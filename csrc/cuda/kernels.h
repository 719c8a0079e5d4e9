// Launchers of the CUDA kernels. Free of torch, so that they compile with nvcc alone.
#pragma once

#include <cuda_runtime_api.h>

#include "../gate.h"
#include "../vocab_loss.h"

namespace megatron_deft::cuda {

enum class Dtype { kFloat, kBFloat16, kHalf };

// stats: [5 + topk, rows] fp32
cudaError_t launch_row_stats(const Shard& shard, int64_t topk, Dtype dtype, float* stats,
                             cudaStream_t stream);
cudaError_t launch_gate_grad(const Shard& shard, const Gradient& gradient, Dtype dtype,
                             cudaStream_t stream);

// stats: [5 + gate.topk, rows] fp32; out: like the logits, or the logits themselves
cudaError_t launch_row_stats_grad(const Shard& shard, const Gate& gate, Dtype dtype, float* stats,
                                  void* out, const RowOffsets& out_offset, cudaStream_t stream);

// Multiplies each row of `shard.logits` by its factor; rows whose factor is 1.0 and ignored rows are
// neither read nor written.
cudaError_t launch_scale_rows(const Shard& shard, const float* factor, Dtype dtype,
                              cudaStream_t stream);

}  // namespace megatron_deft::cuda
