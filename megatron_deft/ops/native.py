"""The compiled operators `torch.ops.megatron_deft.*` of csrc, with their fake kernels."""

import torch
from torch import Tensor

from megatron_deft.errors import UserError

try:
    from megatron_deft import _C  # type: ignore[attr-defined]  # importing it registers the ops

    _problem = ""
except Exception as error:  # one that was built for another torch may raise anything
    _C = None
    _problem = " ".join(f"{type(error).__name__}: {error}".split())

REBUILD = "build it: pip install --no-build-isolation -e ."


def devices() -> tuple[str, ...]:
    """Device types that have compiled kernels."""
    if _C is None:
        return ()
    return ("cpu", "cuda") if _C.cuda else ("cpu",)


def instruction_set() -> str:
    """Which of the CPU kernels run: avx512, avx2 or plain (MEGATRON_DEFT_CPU asks for a lesser).

    Errors: UserError when MEGATRON_DEFT_CPU names one that this processor has not.
    """
    assert _C is not None, "asked for only where the extension loads"
    try:
        return str(_C.instruction_set())
    except ValueError as error:
        raise UserError(str(error).splitlines()[0]) from None


def missing(device_type: str) -> str:
    """Why `device_type` has no compiled kernel, and the mend."""
    if _C is None:
        return f"the extension megatron_deft._C does not load ({_problem}); {REBUILD}"
    return (
        f"the extension megatron_deft._C was built without kernels for {device_type}; "
        f"re{REBUILD}, with a torch that has CUDA, and nvcc (CUDA_HOME)"
    )


if _C is not None:
    row_stats = torch.ops.megatron_deft.row_stats
    gate_grad = torch.ops.megatron_deft.gate_grad
    gate_grad_ = torch.ops.megatron_deft.gate_grad_
    row_stats_grad = torch.ops.megatron_deft.row_stats_grad
    row_stats_grad_ = torch.ops.megatron_deft.row_stats_grad_
    scale_rows_ = torch.ops.megatron_deft.scale_rows_

    @torch.library.register_fake("megatron_deft::row_stats")
    def _(
        logits: Tensor,
        labels: Tensor,
        vocab_start: int,
        vocab_valid: int,
        ignore_index: int,
        topk: int = 0,
    ) -> Tensor:
        return logits.new_empty(5 + topk, labels.numel(), dtype=torch.float32)

    @torch.library.register_fake("megatron_deft::gate_grad")
    def _(logits: Tensor, *rows: object) -> Tensor:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)

    @torch.library.register_fake("megatron_deft::gate_grad_")
    def _(logits: Tensor, *rows: object) -> None:
        return None

    @torch.library.register_fake("megatron_deft::row_stats_grad")
    def _(
        logits: Tensor, labels: Tensor, gate: list[float], vocab_valid: int, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        stats = logits.new_empty(5 + int(gate[7]), labels.numel(), dtype=torch.float32)
        return stats, torch.empty_like(logits, memory_format=torch.contiguous_format)

    @torch.library.register_fake("megatron_deft::row_stats_grad_")
    def _(
        logits: Tensor, labels: Tensor, gate: list[float], vocab_valid: int, ignore_index: int
    ) -> Tensor:
        return logits.new_empty(5 + int(gate[7]), labels.numel(), dtype=torch.float32)

    @torch.library.register_fake("megatron_deft::scale_rows_")
    def _(grad: Tensor, labels: Tensor, factor: Tensor, ignore_index: int) -> None:
        return None
