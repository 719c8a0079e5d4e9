// CPU operators: which rows and which parts of them each thread takes.
//
// Ignored rows are sorted out first, so that a prompt in front does not leave one thread idle. A row
// is reduced in segments of fixed length, merged in order: the same bits for any number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "../ops.h"
#include "elements.h"
#include "fresh_pages.h"
#include "row_kernels.h"

namespace megatron_deft::cpu {
namespace {

constexpr int64_t kSegment = 32768;  // columns
constexpr int64_t kGrain = 16384;    // columns worth handing to a thread

// What one read of a row, or of a segment of it, yields.
struct RowSums {
  Sums sums = no_sums();
  std::array<float, kMaxTopk> top;

  RowSums() { top.fill(-INFINITY); }
};

template <typename T>
class Reader {
 public:
  Reader(const Shard& shard, int64_t topk) : shard_(shard), topk_(topk) {
    for (int64_t row = 0; row < shard.rows; ++row)
      (shard.ignored(row) ? ignored_ : kept_).push_back(row);
  }

  const std::vector<int64_t>& kept() const { return kept_; }
  int64_t segments() const { return std::max<int64_t>(1, at::divup(shard_.vocab_valid, kSegment)); }
  int64_t row_grain() const { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, shard_.columns)); }
  // Few and long rows are cut up among the threads; otherwise a thread keeps a row to itself, whose
  // second pass then finds it in its own cache.
  bool cut() const {
    return segments() > 1 && static_cast<int64_t>(kept_.size()) < 4 * at::get_num_threads();
  }
  const T* row(int64_t row) const {
    return static_cast<const T*>(shard_.logits) + shard_.offset(row);
  }

  // Adds a segment of a row: its sums in order, its largest to the list, whose threshold lets fewer
  // and fewer pass.
  void add_segment(RowSums& into, int64_t row, int64_t segment) const {
    const int64_t begin = segment * kSegment;
    const int64_t count = std::min(kSegment, shard_.vocab_valid - begin);
    into.sums = merge(into.sums,
                      kernels_.sums(this->row(row) + begin, count, into.top.data(), topk_));
  }
  void join(RowSums& into, const RowSums& next) const {
    into.sums = merge(into.sums, next.sums);
    for (int64_t i = 0; i < topk_; ++i) insert_top(next.top[i], into.top.data(), topk_);
  }

  // Calls done(row, sums) for each kept row.
  template <typename Done>
  void read(Done done) const {
    const int64_t rows = kept_.size(), parts = segments();
    if (cut()) {
      std::vector<RowSums> partial(rows * parts);
      at::parallel_for(0, rows * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) add_segment(partial[i], kept_[i / parts], i % parts);
      });
      for (int64_t i = 0; i < rows; ++i) {
        RowSums& all = partial[i * parts];
        for (int64_t part = 1; part < parts; ++part) join(all, partial[i * parts + part]);
        done(kept_[i], all);
      }
      return;
    }
    at::parallel_for(0, rows, row_grain(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        RowSums all;
        for (int64_t part = 0; part < parts; ++part) add_segment(all, kept_[i], part);
        done(kept_[i], all);
      }
    });
  }

  // stats [5 + topk, rows]
  void store_stats(float* stats, int64_t row, const RowSums& all) const {
    const int64_t column = shard_.target(row);
    const Sums& s = all.sums;
    const float values[kStats] = {s.m, s.rest, s.s2, s.sh,
                                  column >= 0 ? to_float(this->row(row)[column]) : 0.0f};
    for (int i = 0; i < kStats; ++i) stats[i * shard_.rows + row] = values[i];
    for (int64_t i = 0; i < topk_; ++i) stats[(kStats + i) * shard_.rows + row] = all.top[i];
  }
  void clear_stats(float* stats) const {
    for (int64_t row : ignored_)
      for (int64_t i = 0; i < kStats + topk_; ++i) stats[i * shard_.rows + row] = 0.0f;
  }

  // Segment `segment` of a row's gradient, from z to out.
  void write_segment(int64_t row, int64_t segment, T* out, float m, float scale,
                     float target_grad) const {
    const int64_t begin = segment * kSegment;
    const int64_t count = std::min(kSegment, shard_.vocab_valid - begin);
    kernels_.gradient(this->row(row) + begin, out + begin, count, m, scale);
    const int64_t column = shard_.target(row);
    if (column >= begin && column < begin + count) from_float(target_grad, out + column);
    if (segment == segments() - 1)  // 0 is all bits 0 in each type
      std::memset(static_cast<void*>(out + begin + count), 0,
                  (shard_.columns - begin - count) * sizeof(T));
  }
  // Zeros for ignored rows, which are not read.
  void clear_ignored(T* out, const RowOffsets& offset) const {
    at::parallel_for(0, ignored_.size(), row_grain(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        std::memset(static_cast<void*>(out + offset(ignored_[i])), 0, shard_.columns * sizeof(T));
    });
  }
  template <typename Gradients>  // row -> (m, scale, target_grad)
  void write(T* out, const RowOffsets& offset, Gradients gradients) const {
    const int64_t parts = segments();
    const int64_t grain = parts > 1 ? 1 : row_grain();
    at::parallel_for(0, kept_.size() * parts, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = kept_[i / parts];
        const auto [m, scale, target_grad] = gradients(row);
        write_segment(row, i % parts, out + offset(row), m, scale, target_grad);
      }
    });
    clear_ignored(out, offset);
  }

 private:
  const Shard& shard_;
  const int64_t topk_;
  const RowKernels<T>& kernels_ = row_kernels<T>();
  std::vector<int64_t> kept_, ignored_;
};

struct RowOut {
  float m, scale, target_grad;
};

}  // namespace

at::Tensor row_stats(const at::Tensor& logits, const at::Tensor& labels, int64_t vocab_start,
                     int64_t vocab_valid, int64_t ignore_index, int64_t topk) {
  check_topk(topk);
  const Rows rows(logits, labels, vocab_start, vocab_valid, ignore_index);
  at::Tensor out = at::empty({kStats + topk, rows.shard.rows}, logits.options().dtype(at::kFloat));
  float* stats = out.mutable_data_ptr<float>();
  dispatch(logits.scalar_type(), [&](auto tag) {
    const Reader<decltype(tag)> reader(rows.shard, topk);
    reader.read([&](int64_t row, const RowSums& all) { reader.store_stats(stats, row, all); });
    reader.clear_stats(stats);
  });
  return out;
}

void gate_grad_out(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& row_max,
                   const at::Tensor& scale, const at::Tensor& target_grad, int64_t vocab_start,
                   int64_t vocab_valid, int64_t ignore_index, const at::Tensor& out) {
  const Rows rows(logits, labels, vocab_start, vocab_valid, ignore_index);
  const Gradient g = gradient_of_rows(rows, row_max, scale, target_grad, out);
  advise_fresh_pages(logits, out);
  dispatch(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    Reader<T>(rows.shard, 0).write(static_cast<T*>(g.out), g.offset, [&](int64_t row) {
      return RowOut{g.row_max[row], g.scale[row], g.target_grad[row]};
    });
  });
}

at::Tensor row_stats_grad_out(const at::Tensor& logits, const at::Tensor& labels,
                              at::ArrayRef<double> gate_numbers, int64_t vocab_valid,
                              int64_t ignore_index, const at::Tensor& out) {
  const Gate gate = gate_of(gate_numbers);
  check_topk(gate.topk);
  const Rows rows(logits, labels, 0, vocab_valid, ignore_index);
  const RowOffsets offset = row_offsets_of(out, "out", true);
  at::Tensor stats_tensor =
      at::empty({kStats + gate.topk, rows.shard.rows}, logits.options().dtype(at::kFloat));
  float* stats = stats_tensor.mutable_data_ptr<float>();
  advise_fresh_pages(logits, out);
  dispatch(logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Reader<T> reader(rows.shard, gate.topk);
    T* grad = static_cast<T*>(out.mutable_data_ptr());
    const auto gradient_of = [&](int64_t row, const RowSums& all) {
      const float z_y = stats[4 * rows.shard.rows + row];
      const float h = gate.topk > 0 ? entropy_of(all.top.data(), gate.topk) : 0.0f;
      const RowGradient g = gradient_of_row(gate, all.sums, z_y, h);
      return RowOut{all.sums.m, g.scale, g.target_grad};
    };
    if (reader.cut()) {
      std::vector<RowOut> gradients(rows.shard.rows);
      reader.read([&](int64_t row, const RowSums& all) {
        reader.store_stats(stats, row, all);
        gradients[row] = gradient_of(row, all);
      });
      reader.write(grad, offset, [&](int64_t row) { return gradients[row]; });
    } else {
      reader.read([&](int64_t row, const RowSums& all) {
        reader.store_stats(stats, row, all);
        const RowOut g = gradient_of(row, all);
        for (int64_t part = 0; part < reader.segments(); ++part)
          reader.write_segment(row, part, grad + offset(row), g.m, g.scale, g.target_grad);
      });
      reader.clear_ignored(grad, offset);
    }
    reader.clear_stats(stats);
  });
  return stats_tensor;
}

void scale_rows_(at::Tensor& grad, const at::Tensor& labels, const at::Tensor& factor,
                 int64_t ignore_index) {
  const Rows rows(grad, labels, 0, grad.size(-1), ignore_index);
  row_offsets_of(grad, "grad", true);
  const float* factors = per_row(factor, rows.shard.rows, grad.device(), "factor");
  dispatch(grad.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    T* out = static_cast<T*>(grad.mutable_data_ptr());
    const RowKernels<T>& kernels = row_kernels<T>();
    std::vector<int64_t> changed;
    for (int64_t row = 0; row < rows.shard.rows; ++row)
      if (!rows.shard.ignored(row) && factors[row] != 1.0f) changed.push_back(row);
    const int64_t columns = rows.shard.columns;
    at::parallel_for(0, changed.size(), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)),
                     [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* z = out + rows.shard.offset(changed[i]);
        const float f = factors[changed[i]];
        if (f == 0.0f) std::memset(static_cast<void*>(z), 0, columns * sizeof(T));
        else kernels.scale(z, columns, f);
      }
    });
  });
}

}  // namespace megatron_deft::cpu
