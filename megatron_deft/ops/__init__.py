"""The operators of the loss, chosen by device: the compiled kernels, else their plain twins.

`MEGATRON_DEFT_OPS=reference` forces the twins, `native` makes a missing kernel an error; the
default, `auto`, uses the twins with one warning. Both compute the same thing; only memory and time
differ.
"""

import os
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from megatron_deft.errors import UserError
from megatron_deft.ops import native, reference

MODES = ("auto", "native", "reference")


_chosen: dict[tuple[str, str], ModuleType] = {}  # a dict, not functools.cache: Dynamo reads it


def _choose(device_type: str, mode: str) -> ModuleType:
    if mode not in MODES:
        raise UserError(f"MEGATRON_DEFT_OPS={mode}: legal are {', '.join(MODES)}")
    if mode == "reference":
        return reference
    if device_type in native.devices() or (device_type == "meta" and native.devices()):
        native.instruction_set()  # a wrong MEGATRON_DEFT_CPU is told before any kernel runs
        return native
    reason = native.missing(device_type)
    if mode == "native":
        raise UserError(f"MEGATRON_DEFT_OPS=native, but {reason}")
    warnings.warn(f"megatron_deft uses its plain torch operators: {reason}", stacklevel=3)
    return reference


def implementation(device: torch.device) -> ModuleType:
    """The module whose operators serve tensors on `device`."""
    key = device.type, os.environ.get("MEGATRON_DEFT_OPS", "auto")
    if key not in _chosen:
        _chosen[key] = _choose(*key)
    return _chosen[key]


def row_stats(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    vocab_valid: int,
    ignore_index: int,
    topk: int = 0,
) -> Tensor:
    """See `reference.row_stats`."""
    return implementation(logits.device).row_stats(
        logits, labels, vocab_start, vocab_valid, ignore_index, topk
    )


def gate_grad(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    scale: Tensor,
    target_grad: Tensor,
    vocab_start: int,
    vocab_valid: int,
    ignore_index: int,
    *,
    inplace: bool,
) -> Tensor:
    """See `reference.gate_grad`; with `inplace` the result is `logits` itself, overwritten."""
    ops = implementation(logits.device)
    arguments = (labels, row_max, scale, target_grad, vocab_start, vocab_valid, ignore_index)
    if not inplace:
        return ops.gate_grad(logits, *arguments)
    ops.gate_grad_(logits, *arguments)
    _count_the_write(logits)
    return logits


def row_stats_grad(
    logits: Tensor,
    labels: Tensor,
    gate: Sequence[float],
    vocab_valid: int,
    ignore_index: int,
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.row_stats_grad`; with `inplace` the gradient is `logits` itself."""
    ops = implementation(logits.device)
    if not inplace:
        return ops.row_stats_grad(logits, labels, gate, vocab_valid, ignore_index)
    stats = ops.row_stats_grad_(logits, labels, gate, vocab_valid, ignore_index)
    _count_the_write(logits)
    return stats, logits


def scale_rows_(grad: Tensor, labels: Tensor, factor: Tensor, ignore_index: int) -> None:
    """See `reference.scale_rows_`."""
    implementation(grad.device).scale_rows_(grad, labels, factor, ignore_index)
    _count_the_write(grad)


def _count_the_write(tensor: Tensor) -> None:
    """Operators registered from C++ do not count their writes, and autograd would not see them.

    Without this a second backward, or another operator that saved the logits, would read the
    gradient as if it were logits.
    """
    torch.autograd.graph.increment_version(tensor)
