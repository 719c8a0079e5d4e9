// Runs launchers of csrc/cuda/kernels.h on cases from a file and writes the buffers after each.
//
//   run_kernels CASES RESULTS SHARED CLUSTERS
//
// on a device with SHARED bytes of shared memory for a block, and clusters or not (1 or 0).
// A case: 24 int64, 8 double, then the buffers, each a length in bytes (int64) and that many bytes:
// labels, logits, out (empty: in place), stats, and three per-row inputs. The result: the buffers
// logits, out and stats.
#include <fstream>
#include <memory>

#include "../../../csrc/cuda/plan.h"
#include "emulated_ptx.h"

namespace cuda = megatron_deft::cuda;

namespace {

template <typename T>
T read(std::istream& in) {
  T value{};
  in.read(reinterpret_cast<char*>(&value), sizeof(T));
  return value;
}

// Exactly as long as asked for, so that the sanitizer sees the first byte beyond, and at a multiple
// of 16, so that the test chooses the alignment.
struct Free {
  void operator()(char* p) const { std::free(p); }
};

class Bytes {
 public:
  explicit Bytes(std::istream& in) : size_(static_cast<size_t>(read<int64_t>(in))) {
    data_.reset(static_cast<char*>(std::malloc(size_)));  // malloc aligns to 16
    in.read(data_.get(), static_cast<std::streamsize>(size_));
  }
  void write(std::ostream& out) const {
    out.write(data_.get(), static_cast<std::streamsize>(size_));
  }
  bool empty() const { return size_ == 0; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  size_t size_;
  std::unique_ptr<char, Free> data_;
};

enum Op { kRowStats, kGateGrad, kRowStatsGrad, kScaleRows };

cudaError_t run_case(std::istream& in, std::ostream& results) {
  int64_t n[24];
  for (int64_t& value : n) value = read<int64_t>(in);
  double g[8];
  for (double& value : g) value = read<double>(in);
  const Bytes labels(in), logits(in), out(in), stats(in), a(in), b(in), c(in);

  const auto dtype = static_cast<cuda::Dtype>(n[1]);
  const int64_t element = dtype == cuda::Dtype::kFloat ? 4 : 2;
  const int64_t topk = n[8];
  char* z = logits.as<char>() + n[9] * element;
  const megatron_deft::RowOffsets from{n[4], n[17], n[18]};
  const megatron_deft::Shard shard{z,    labels.as<int64_t>(), n[2], n[3], from,
                                   n[5], n[6],                 n[7]};
  void* to = out.empty() ? z : out.as<char>() + n[10] * element;
  const megatron_deft::RowOffsets to_offset = out.empty() ? from : megatron_deft::RowOffsets{n[11]};
  const bool planned = n[12] > 0;
  const cuda::Plan plan{static_cast<int>(n[12]), static_cast<int>(n[13]), n[14] != 0};
  cuda::ptx::kBulkCopies = n[15] != 0;
  emulator::order = static_cast<emulator::Order>(n[16]);

  cudaError_t error = cudaErrorInvalidValue;
  switch (static_cast<Op>(n[0])) {
    case kRowStats:
      error = planned ? cuda::run_row_stats(shard, topk, dtype, stats.as<float>(), nullptr, plan)
                      : cuda::launch_row_stats(shard, topk, dtype, stats.as<float>(), nullptr);
      break;
    case kGateGrad: {
      const megatron_deft::Gradient gradient{to, to_offset, a.as<float>(), b.as<float>(),
                                             c.as<float>()};
      error = planned ? cuda::run_gate_grad(shard, gradient, dtype, nullptr, plan)
                      : cuda::launch_gate_grad(shard, gradient, dtype, nullptr);
      break;
    }
    case kRowStatsGrad: {
      const auto f = [&](int i) { return static_cast<float>(g[i]); };
      const megatron_deft::Gate gate{static_cast<megatron_deft::Exponent>(static_cast<int>(g[0])),
                                     f(1), f(2), f(3), f(4), f(5), f(6), topk};
      error = planned ? cuda::run_row_stats_grad(shard, gate, dtype, stats.as<float>(), to,
                                                 to_offset, nullptr, plan)
                      : cuda::launch_row_stats_grad(shard, gate, dtype, stats.as<float>(), to,
                                                    to_offset, nullptr);
      break;
    }
    case kScaleRows:
      error = planned ? cuda::run_scale_rows(shard, a.as<float>(), dtype, nullptr, plan)
                      : cuda::launch_scale_rows(shard, a.as<float>(), dtype, nullptr);
  }
  logits.write(results);
  out.write(results);
  stats.write(results);
  return error;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  emulator::machine.shared_per_block = std::atoi(argv[3]);
  emulator::machine.clusters = std::atoi(argv[4]);
  std::ifstream cases(argv[1], std::ios::binary);
  std::ofstream results(argv[2], std::ios::binary);
  for (int i = 0; cases.peek() != std::ifstream::traits_type::eof(); ++i)
    if (const cudaError_t error = run_case(cases, results); error != cudaSuccess) {
      std::fprintf(stderr, "case %d: error %d\n", i, static_cast<int>(error));
      return 1;
    }
  return results.flush() ? 0 : 1;
}
