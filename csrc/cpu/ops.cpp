// CPU kernels of the megatron_deft operators: parallel over rows, one row after another.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "../ops.h"
#include "row_kernels.h"

namespace megatron_deft::cpu {
namespace {

#define MDEFT_INSTANTIATE(T)                                                                      \
  MDEFT_CLONES Sums sums_of(const T* z, int64_t n) { return row_sums(z, n); }                     \
  MDEFT_CLONES void gradient_of(const T* z, T* out, int64_t n, float m, float scale) {            \
    scaled_exp(z, out, n, m, scale);                                                              \
  }
MDEFT_INSTANTIATE(float)
MDEFT_INSTANTIATE(c10::BFloat16)
MDEFT_INSTANTIATE(c10::Half)
#undef MDEFT_INSTANTIATE

template <typename T>
void row_stats_rows(const Shard& shard, float* out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    Sums sums{0.0f, 0.0f, 0.0f, 0.0f};
    float target = 0.0f;
    if (!shard.ignored(row)) {
      const T* z = static_cast<const T*>(shard.logits) + row * shard.row_stride;
      sums = sums_of(z, shard.vocab_valid);
      const int64_t column = shard.target(row);
      if (column >= 0) target = to_float(z[column]);
    }
    const float values[kStats] = {sums.m, sums.s1, sums.s2, sums.sh, target};
    for (int i = 0; i < kStats; ++i) out[i * shard.rows + row] = values[i];
  }
}

template <typename T>
void row_topk_rows(const Shard& shard, int64_t k, float* out, int64_t begin, int64_t end) {
  std::vector<float> best(k);
  for (int64_t row = begin; row < end; ++row) {
    const bool ignored = shard.ignored(row);
    std::fill(best.begin(), best.end(), ignored ? 0.0f : -std::numeric_limits<float>::infinity());
    if (!ignored) {
      const T* z = static_cast<const T*>(shard.logits) + row * shard.row_stride;
      for (int64_t i = 0; i < shard.vocab_valid; ++i) {
        const float x = to_float(z[i]);
        if (x <= best[k - 1]) continue;  // nan passes on and poisons the row, as it should
        int64_t at = k - 1;
        for (; at > 0 && !(x <= best[at - 1]); --at) best[at] = best[at - 1];
        best[at] = x;
      }
    }
    for (int64_t i = 0; i < k; ++i) out[i * shard.rows + row] = best[i];
  }
}

template <typename T>
void gate_grad_rows(const Shard& shard, const Gradient& gradient, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* z = static_cast<const T*>(shard.logits) + row * shard.row_stride;
    T* out = static_cast<T*>(gradient.out) + row * gradient.row_stride;
    const bool ignored = shard.ignored(row);
    if (!ignored) {
      gradient_of(z, out, shard.vocab_valid, gradient.row_max[row], gradient.scale[row]);
      const int64_t column = shard.target(row);
      if (column >= 0) from_float(gradient.target_grad[row], out + column);
    }
    std::fill(out + (ignored ? 0 : shard.vocab_valid), out + shard.columns, T(0.0f));
  }
}

// Rows one thread takes at a time: enough columns to be worth handing over.
int64_t grain(const Shard& shard) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, shard.columns));
}

}  // namespace

at::Tensor row_stats(const at::Tensor& logits, const at::Tensor& labels, int64_t vocab_start,
                     int64_t vocab_valid, int64_t ignore_index) {
  const Rows rows(logits, labels, vocab_start, vocab_valid, ignore_index);
  at::Tensor out = at::empty({kStats, rows.shard.rows}, logits.options().dtype(at::kFloat));
  float* data = out.mutable_data_ptr<float>();
  at::parallel_for(0, rows.shard.rows, grain(rows.shard), [&](int64_t begin, int64_t end) {
    dispatch(logits.scalar_type(), [&](auto tag) {
      row_stats_rows<decltype(tag)>(rows.shard, data, begin, end);
    });
  });
  return out;
}

at::Tensor row_topk(const at::Tensor& logits, const at::Tensor& labels, int64_t k,
                    int64_t vocab_valid, int64_t ignore_index) {
  TORCH_CHECK_VALUE(k > 0, "row_topk: expected k > 0, got ", k);
  const Rows rows(logits, labels, 0, vocab_valid, ignore_index);
  at::Tensor out = at::empty({k, rows.shard.rows}, logits.options().dtype(at::kFloat));
  float* data = out.mutable_data_ptr<float>();
  at::parallel_for(0, rows.shard.rows, grain(rows.shard), [&](int64_t begin, int64_t end) {
    dispatch(logits.scalar_type(), [&](auto tag) {
      row_topk_rows<decltype(tag)>(rows.shard, k, data, begin, end);
    });
  });
  return out;
}

void gate_grad_out(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& row_max,
                   const at::Tensor& scale, const at::Tensor& target_grad, int64_t vocab_start,
                   int64_t vocab_valid, int64_t ignore_index, const at::Tensor& out) {
  const Rows rows(logits, labels, vocab_start, vocab_valid, ignore_index);
  const Gradient gradient = gradient_of_rows(rows, row_max, scale, target_grad, out);
  at::parallel_for(0, rows.shard.rows, grain(rows.shard), [&](int64_t begin, int64_t end) {
    dispatch(logits.scalar_type(), [&](auto tag) {
      gate_grad_rows<decltype(tag)>(rows.shard, gradient, begin, end);
    });
  });
}

}  // namespace megatron_deft::cpu
