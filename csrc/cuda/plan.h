// How many threads and blocks work on a row: functions of the shape and of the device alone.
//
// The launchers of kernels.h choose with these; the run_* forms take any plan, so that the tests can
// try those that a device at hand would not choose.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace megatron_deft::cuda {

constexpr int64_t kMaxGrid = 2147483647;
constexpr int kMaxParts = 8;  // the largest cluster that every device with clusters can hold

struct Device {
  int multiprocessors;
  int64_t shared_per_block;  // bytes a block can ask for
  bool clusters;
};

struct Plan {
  int threads;  // of a block: a multiple of 32
  int parts;    // blocks of a row; a cluster where they exchange sums
  bool on_chip = false;  // row_stats_grad: the row stays in shared memory
};

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Powers of two, enough that each thread has a batch of vectors to read.
inline int threads_for(int64_t vectors, int most) {
  int threads = 32;
  while (threads < most && threads * 4 < vectors) threads *= 2;
  return threads;
}

// One block reads a row. Few and long rows are cut up among a cluster, to have work for all
// multiprocessors.
inline Plan row_stats_plan(const Device& device, int64_t rows, int64_t columns, int64_t element) {
  const int64_t vectors = divided_up(columns * element, 16);
  // A short row is over in a few batches: twice as many blocks, half as large, hide how each starts
  // and ends behind the others' reads.
  Plan plan{threads_for(vectors, vectors < 4096 ? 128 : 256), 1};
  while (device.clusters && plan.parts < kMaxParts &&
         rows * plan.parts < 4 * device.multiprocessors &&
         vectors / (2 * plan.parts) >= 8 * plan.threads)
    plan.parts *= 2;
  return plan;
}

// gate_grad and scale_rows: 16 vectors for each thread, enough to make up for starting a block.
inline Plan elementwise_plan(int64_t rows, int64_t columns, int64_t element) {
  const int64_t vectors = divided_up(columns * element, 16);
  const int threads = threads_for(vectors, 256);
  const int64_t most = std::max<int64_t>(1, kMaxGrid / std::max<int64_t>(1, rows));
  const int64_t parts = std::clamp<int64_t>(divided_up(vectors, 16 * threads), 1, most);
  return {threads, static_cast<int>(parts)};
}

// What a block of row_stats_grad can have: selecting the top k, or prefetching from global memory,
// takes more registers.
constexpr int most_threads(bool on_chip, bool with_topk) {
  return on_chip && !with_topk ? 512 : 256;
}

// row_stats_grad: slices small enough that four blocks share a multiprocessor, one of them copying
// in while others sum or write. `overhead`: shared memory of a block besides its slice.
inline Plan row_stats_grad_plan(const Device& device, int64_t rows, int64_t columns,
                                int64_t element, int64_t overhead, bool with_topk) {
  constexpr int64_t kQuarter = 55 * 1024;
  const int64_t bytes = divided_up(columns * element, 16) * 16;
  Plan plan{32, 1};
  const auto slice = [&] { return divided_up(bytes / 16, plan.parts) * 16; };
  while (device.clusters && plan.parts < kMaxParts && rows * plan.parts * 2 <= kMaxGrid &&
         (slice() + overhead > kQuarter ||
          (rows * plan.parts < 2 * device.multiprocessors && slice() > 16 * 1024)))
    plan.parts *= 2;
  plan.on_chip = slice() + overhead <= device.shared_per_block;
  const int most = most_threads(plan.on_chip, with_topk);
  plan.threads = threads_for(slice() / 16, slice() + overhead > kQuarter ? most : 256);
  return plan;
}

cudaError_t run_row_stats(const Shard& shard, int64_t topk, Dtype dtype, float* stats,
                          cudaStream_t stream, const Plan& plan);
cudaError_t run_gate_grad(const Shard& shard, const Gradient& gradient, Dtype dtype,
                          cudaStream_t stream, const Plan& plan);
cudaError_t run_row_stats_grad(const Shard& shard, const Gate& gate, Dtype dtype, float* stats,
                               void* out, const RowOffsets& out_offset, cudaStream_t stream,
                               const Plan& plan);
cudaError_t run_scale_rows(const Shard& shard, const float* factor, Dtype dtype,
                           cudaStream_t stream, const Plan& plan);

}  // namespace megatron_deft::cuda
