// CUDA operators: checks, the current stream, the launchers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

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

cudaStream_t stream() { return c10::cuda::getCurrentCUDAStream(); }

at::Tensor empty_stats(const at::Tensor& logits, int64_t topk, int64_t rows) {
  return at::empty({kStats + topk, rows}, logits.options().dtype(at::kFloat));
}

}  // namespace

at::Tensor row_stats(const at::Tensor& logits, const at::Tensor& labels, int64_t vocab_start,
                     int64_t vocab_valid, int64_t ignore_index, int64_t topk) {
  check_topk(topk);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Rows rows(logits, labels, vocab_start, vocab_valid, ignore_index);
  at::Tensor stats = empty_stats(logits, topk, rows.shard.rows);
  C10_CUDA_CHECK(launch_row_stats(rows.shard, topk, dtype_of(logits),
                                  stats.mutable_data_ptr<float>(), stream()));
  return stats;
}

void gate_grad_out(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& row_max,
                   const at::Tensor& scale, const at::Tensor& target_grad, int64_t vocab_start,
                   int64_t vocab_valid, int64_t ignore_index, const at::Tensor& out) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const Rows rows(logits, labels, vocab_start, vocab_valid, ignore_index);
  const Gradient gradient = gradient_of_rows(rows, row_max, scale, target_grad, out);
  C10_CUDA_CHECK(launch_gate_grad(rows.shard, gradient, dtype_of(logits), stream()));
}

at::Tensor row_stats_grad_out(const at::Tensor& logits, const at::Tensor& labels,
                              at::ArrayRef<double> gate_numbers, int64_t vocab_valid,
                              int64_t ignore_index, const at::Tensor& out) {
  const Gate gate = gate_of(gate_numbers);
  check_topk(gate.topk);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Rows rows(logits, labels, 0, vocab_valid, ignore_index);
  at::Tensor stats = empty_stats(logits, gate.topk, rows.shard.rows);
  C10_CUDA_CHECK(launch_row_stats_grad(rows.shard, gate, dtype_of(logits),
                                       stats.mutable_data_ptr<float>(), out.mutable_data_ptr(),
                                       row_offsets_of(out, "out", true), stream()));
  return stats;
}

void scale_rows_(at::Tensor& grad, const at::Tensor& labels, const at::Tensor& factor,
                 int64_t ignore_index) {
  const c10::cuda::CUDAGuard guard(grad.device());
  const Rows rows(grad, labels, 0, grad.size(-1), ignore_index);
  row_offsets_of(grad, "grad", true);
  C10_CUDA_CHECK(launch_scale_rows(rows.shard, per_row(factor, rows.shard.rows, grad.device(), "factor"),
                                   dtype_of(grad), stream()));
}

}  // namespace megatron_deft::cuda
