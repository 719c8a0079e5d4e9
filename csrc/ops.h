// Checks and dispatch that the CPU and the CUDA operators share. Messages say expected, got, remedy.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include "gate.h"
#include "vocab_loss.h"

namespace megatron_deft {

// Calls `f` with a value of the C++ type of `dtype`.
template <typename F>
void dispatch(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat: return f(float{});
    case at::kBFloat16: return f(c10::BFloat16{});
    case at::kHalf: return f(c10::Half{});
    default:
      TORCH_CHECK_TYPE(false, "logits: expected float32, bfloat16 or float16, got ", dtype,
                       "; convert them first");
  }
}

// Where the rows of `t` [..., V] begin; an error where that takes more than two strides. Rows that are
// written must not overlap.
inline RowOffsets row_offsets_of(const at::Tensor& t, const char* name, bool written = false) {
  TORCH_CHECK_VALUE(t.dim() >= 1 && (t.size(-1) <= 1 || t.stride(-1) == 1), name,
                    ": expected the vocabulary as last dimension with stride 1, got sizes ",
                    t.sizes(), " strides ", t.strides(), "; call .contiguous()");
  const int64_t columns = t.size(-1);
  if (t.numel() == 0 || t.is_contiguous()) return {columns};
  int64_t size[2] = {1, 1}, stride[2] = {columns, 0};  // inner, outer
  int runs = 0;
  for (int64_t d = t.dim() - 2; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (runs > 0 && t.stride(d) == stride[runs - 1] * size[runs - 1]) {
      size[runs - 1] *= t.size(d);
      continue;
    }
    TORCH_CHECK_VALUE(runs < 2, name, ": expected rows of at most two strides, got sizes ",
                      t.sizes(), " strides ", t.strides(), "; call .contiguous()");
    size[runs] = t.size(d);
    stride[runs++] = t.stride(d);
  }
  if (written) {
    const int low = runs > 1 && stride[1] < stride[0];
    const bool apart = stride[low] >= columns &&
                       (runs < 2 || stride[1 - low] >= stride[low] * (size[low] - 1) + columns);
    TORCH_CHECK_VALUE(apart, name, ": expected rows that do not overlap, got sizes ", t.sizes(),
                      " strides ", t.strides(), "; call .contiguous()");
  }
  return runs < 2 ? RowOffsets{stride[0]} : RowOffsets{stride[0], size[0], stride[1]};
}

struct Rows {
  at::Tensor labels;  // keeps the flat copy alive
  Shard shard;

  Rows(const at::Tensor& logits, const at::Tensor& labels_, int64_t vocab_start,
       int64_t vocab_valid, int64_t ignore_index) {
    TORCH_CHECK_VALUE(logits.dim() == labels_.dim() + 1 &&
                          logits.sizes().slice(0, labels_.dim()) == labels_.sizes(),
                      "labels: expected the logits' shape ", logits.sizes(),
                      " without its last dimension, got ", labels_.sizes());
    TORCH_CHECK_TYPE(labels_.scalar_type() == at::kLong, "labels: expected int64, got ",
                     labels_.scalar_type(), "; call .long()");
    TORCH_CHECK_VALUE(labels_.device() == logits.device(), "labels: expected device ",
                      logits.device(), ", got ", labels_.device());
    TORCH_CHECK_VALUE(vocab_valid >= 0 && vocab_valid <= logits.size(-1),
                      "vocab_valid: expected 0 to V_local = ", logits.size(-1), ", got ",
                      vocab_valid);
    labels = labels_.contiguous();
    shard.logits = logits.const_data_ptr();
    shard.labels = labels.const_data_ptr<int64_t>();
    shard.rows = labels.numel();
    shard.columns = logits.size(-1);
    shard.offset = row_offsets_of(logits, "logits");
    shard.vocab_start = vocab_start;
    shard.vocab_valid = vocab_valid;
    shard.ignore_index = ignore_index;
  }
};

inline const float* per_row(const at::Tensor& t, int64_t rows, const at::Device& device,
                            const char* name) {
  TORCH_CHECK_VALUE(t.device() == device, name, ": expected device ", device, ", got ", t.device());
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() == rows, name,
                    ": expected ", rows, " contiguous float32 values, got ", t.sizes(), " ",
                    t.scalar_type());
  return t.const_data_ptr<float>();
}

inline Gradient gradient_of_rows(const Rows& rows, const at::Tensor& row_max,
                                 const at::Tensor& scale, const at::Tensor& target_grad,
                                 const at::Tensor& out) {
  const int64_t n = rows.shard.rows;
  const at::Device device = out.device();
  return {out.mutable_data_ptr(), row_offsets_of(out, "out", true),
          per_row(row_max, n, device, "row_max"), per_row(scale, n, device, "scale"),
          per_row(target_grad, n, device, "target_grad")};
}

// The numbers in the order of megatron_deft.objectives.Gate.
inline Gate gate_of(at::ArrayRef<double> numbers) {
  TORCH_CHECK_VALUE(numbers.size() == 8, "gate: expected the 8 numbers of objectives.Gate, got ",
                    numbers.size());
  const auto number = [&](int i) { return static_cast<float>(numbers[i]); };
  const auto exponent_of = static_cast<int64_t>(numbers[0]);
  const auto topk = static_cast<int64_t>(numbers[7]);
  TORCH_CHECK_VALUE(exponent_of >= 0 && exponent_of <= 2, "gate: expected exponent_of 0 to 2, got ",
                    exponent_of);
  return {static_cast<Exponent>(exponent_of), number(1), number(2), number(3), number(4), number(5),
          number(6), topk};
}

inline void check_topk(int64_t topk) {
  TORCH_CHECK_VALUE(topk >= 0 && topk <= kMaxTopk, "topk: expected 0 to ", kMaxTopk, ", got ",
                    topk);
}

// Each returns or fills what its schema in bindings.cpp says; `out` may be the logits.
#define MDEFT_DECLARE_OPS                                                                         \
  at::Tensor row_stats(const at::Tensor& logits, const at::Tensor& labels, int64_t vocab_start,   \
                       int64_t vocab_valid, int64_t ignore_index, int64_t topk);                  \
  void gate_grad_out(const at::Tensor& logits, const at::Tensor& labels,                          \
                     const at::Tensor& row_max, const at::Tensor& scale,                          \
                     const at::Tensor& target_grad, int64_t vocab_start, int64_t vocab_valid,     \
                     int64_t ignore_index, const at::Tensor& out);                                \
  at::Tensor row_stats_grad_out(const at::Tensor& logits, const at::Tensor& labels,               \
                                at::ArrayRef<double> gate, int64_t vocab_valid,                   \
                                int64_t ignore_index, const at::Tensor& out);                     \
  void scale_rows_(at::Tensor& grad, const at::Tensor& labels, const at::Tensor& factor,          \
                   int64_t ignore_index);

namespace cpu {
MDEFT_DECLARE_OPS
}
namespace cuda {
MDEFT_DECLARE_OPS
}
#undef MDEFT_DECLARE_OPS

}  // namespace megatron_deft
