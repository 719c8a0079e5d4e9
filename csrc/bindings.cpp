// Registration of the operators: schemas once, then one implementation per device.
#include <ATen/ops/empty_like.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "cpu/row_kernels.h"
#include "ops.h"

namespace megatron_deft {
namespace {

using GateGradOut = decltype(cpu::gate_grad_out);

template <GateGradOut* out_kernel>
at::Tensor gate_grad(const at::Tensor& logits, const at::Tensor& labels, const at::Tensor& row_max,
                     const at::Tensor& scale, const at::Tensor& target_grad, int64_t vocab_start,
                     int64_t vocab_valid, int64_t ignore_index) {
  at::Tensor out = at::empty_like(logits, at::MemoryFormat::Contiguous);
  out_kernel(logits, labels, row_max, scale, target_grad, vocab_start, vocab_valid, ignore_index,
             out);
  return out;
}

template <GateGradOut* out_kernel>
void gate_grad_(at::Tensor& logits, const at::Tensor& labels, const at::Tensor& row_max,
                const at::Tensor& scale, const at::Tensor& target_grad, int64_t vocab_start,
                int64_t vocab_valid, int64_t ignore_index) {
  out_kernel(logits, labels, row_max, scale, target_grad, vocab_start, vocab_valid, ignore_index,
             logits);
}

using RowStatsGradOut = decltype(cpu::row_stats_grad_out);

template <RowStatsGradOut* out_kernel>
std::tuple<at::Tensor, at::Tensor> row_stats_grad(const at::Tensor& logits,
                                                  const at::Tensor& labels,
                                                  at::ArrayRef<double> gate, int64_t vocab_valid,
                                                  int64_t ignore_index) {
  at::Tensor out = at::empty_like(logits, at::MemoryFormat::Contiguous);
  at::Tensor stats = out_kernel(logits, labels, gate, vocab_valid, ignore_index, out);
  return {stats, out};
}

template <RowStatsGradOut* out_kernel>
at::Tensor row_stats_grad_(at::Tensor& logits, const at::Tensor& labels, at::ArrayRef<double> gate,
                           int64_t vocab_valid, int64_t ignore_index) {
  return out_kernel(logits, labels, gate, vocab_valid, ignore_index, logits);
}

}  // namespace

TORCH_LIBRARY(megatron_deft, m) {
  m.def(
      "row_stats(Tensor logits, Tensor labels, int vocab_start, int vocab_valid, int ignore_index, "
      "int topk=0) -> Tensor");
  m.def(
      "gate_grad(Tensor logits, Tensor labels, Tensor row_max, Tensor scale, Tensor target_grad, "
      "int vocab_start, int vocab_valid, int ignore_index) -> Tensor");
  m.def(
      "gate_grad_(Tensor(a!) logits, Tensor labels, Tensor row_max, Tensor scale, "
      "Tensor target_grad, int vocab_start, int vocab_valid, int ignore_index) -> ()");
  m.def(
      "row_stats_grad(Tensor logits, Tensor labels, float[] gate, int vocab_valid, "
      "int ignore_index) -> (Tensor, Tensor)");
  m.def(
      "row_stats_grad_(Tensor(a!) logits, Tensor labels, float[] gate, int vocab_valid, "
      "int ignore_index) -> Tensor");
  m.def(
      "scale_rows_(Tensor(a!) grad, Tensor labels, Tensor factor, int ignore_index) -> ()");
}

TORCH_LIBRARY_IMPL(megatron_deft, CPU, m) {
  m.impl("row_stats", cpu::row_stats);
  m.impl("gate_grad", gate_grad<cpu::gate_grad_out>);
  m.impl("gate_grad_", gate_grad_<cpu::gate_grad_out>);
  m.impl("row_stats_grad", row_stats_grad<cpu::row_stats_grad_out>);
  m.impl("row_stats_grad_", row_stats_grad_<cpu::row_stats_grad_out>);
  m.impl("scale_rows_", cpu::scale_rows_);
}

#ifdef MDEFT_WITH_CUDA
TORCH_LIBRARY_IMPL(megatron_deft, CUDA, m) {
  m.impl("row_stats", cuda::row_stats);
  m.impl("gate_grad", gate_grad<cuda::gate_grad_out>);
  m.impl("gate_grad_", gate_grad_<cuda::gate_grad_out>);
  m.impl("row_stats_grad", row_stats_grad<cuda::row_stats_grad_out>);
  m.impl("row_stats_grad_", row_stats_grad_<cuda::row_stats_grad_out>);
  m.impl("scale_rows_", cuda::scale_rows_);
}
#endif

}  // namespace megatron_deft

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of megatron_deft; importing it registers torch.ops.megatron_deft.*";
  m.def("instruction_set", megatron_deft::cpu::instruction_set,
        "Of the CPU kernels: avx512, avx2 or plain; MEGATRON_DEFT_CPU asks for a lesser one");
#ifdef MDEFT_WITH_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
}
