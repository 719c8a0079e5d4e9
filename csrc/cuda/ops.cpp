// CUDA operators: checks, the current stream, the launchers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <limits>

#include "../ops.h"
#include "kernels.h"

namespace megatron_deft::cuda {
namespace {

Dtype dtype_of(const at::Tensor& logits) {
  switch (logits.scalar_type()) {
    case at::kFloat: return Dtype::kFloat;
    case at::kBFloat16: return Dtype::kBFloat16;
    case at::kHalf: return Dtype::kHalf;
    default:
      TORCH_CHECK_TYPE(false, "logits: expected float32, bfloat16 or float16, got ",
                       logits.scalar_type(), "; convert them first");
  }
}

}  // namespace

at::Tensor row_stats(const at::Tensor& logits, const at::Tensor& labels, int64_t vocab_start,
                     int64_t vocab_valid, int64_t ignore_index) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const Rows rows(logits, labels, vocab_start, vocab_valid, ignore_index);
  at::Tensor out = at::empty({kStats, rows.shard.rows}, logits.options().dtype(at::kFloat));
  C10_CUDA_CHECK(launch_row_stats(rows.shard, dtype_of(logits), out.mutable_data_ptr<float>(),
                                  c10::cuda::getCurrentCUDAStream()));
  return out;
}

// torch's own selection per shard: a fused one is not written yet.
at::Tensor row_topk(const at::Tensor& logits, const at::Tensor& labels, int64_t k,
                    int64_t vocab_valid, int64_t ignore_index) {
  TORCH_CHECK_VALUE(k > 0, "row_topk: expected k > 0, got ", k);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Rows rows(logits, labels, 0, vocab_valid, ignore_index);
  const int64_t found = std::min(k, vocab_valid);
  const at::Tensor flat = logits.reshape({rows.shard.rows, logits.size(-1)});
  const at::Tensor top = std::get<0>(flat.narrow(1, 0, vocab_valid).topk(found, 1));
  at::Tensor out = at::empty({k, rows.shard.rows}, logits.options().dtype(at::kFloat));
  out.fill_(-std::numeric_limits<float>::infinity());
  out.narrow(0, 0, found).copy_(top.t());
  return out.masked_fill_(rows.labels.reshape({1, -1}).eq(ignore_index), 0.0);
}

void gate_grad_out(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& row_max,
                   const at::Tensor& scale, const at::Tensor& target_grad, int64_t vocab_start,
                   int64_t vocab_valid, int64_t ignore_index, const at::Tensor& out) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const Rows rows(logits, labels, vocab_start, vocab_valid, ignore_index);
  const Gradient gradient = gradient_of_rows(rows, row_max, scale, target_grad, out);
  C10_CUDA_CHECK(launch_gate_grad(rows.shard, gradient, dtype_of(logits),
                                  c10::cuda::getCurrentCUDAStream()));
}

}  // namespace megatron_deft::cuda
