"""Other packages' cross-entropies, each loaded when it is measured and not before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from megatron_deft import platform

Loss = Callable[[Tensor, Tensor], Tensor]
IGNORE = -100


@dataclass(frozen=True)
class Peer:
    """A cross-entropy of another package.

    load:      returns (logits [N, V], labels [N]) -> loss [N] or their sum; ImportError when the
               installed version lacks it
    package:   the distribution it comes in
    rounds_to: dtype its gradient passes through, when coarser than the logits'
    """

    name: str
    what: str
    package: str
    load: Callable[[], Loss]
    devices: tuple[str, ...] = ("cuda",)
    rounds_to: torch.dtype | None = None


def version(package: str) -> str | None:
    """The installed version of a distribution, None when there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tensor_parallel_group() -> Any:
    """megatron-core's group of this one rank; started on first use.

    Its redirections to the CPU are taken back at once: they cost every torch call some time.
    """
    with platform.cpu_platform():
        from megatron.core import parallel_state

        if not parallel_state.model_parallel_is_initialized():
            platform.initialize()
        return parallel_state.get_tensor_model_parallel_group()


def close() -> None:
    """End what the peers started."""
    if "megatron.core.parallel_state" in sys.modules:
        with platform.cpu_platform():
            platform.shutdown()


def _as_megatron_calls(cross_entropy: Loss) -> Loss:
    """Sequence first, a batch of one, and a loss mask: megatron-core knows no ignored label."""

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(logits[:, None], labels.clamp(min=0)[:, None])[:, 0]
        return loss * (labels != IGNORE)

    return loss_of


def _megatron() -> Loss:
    _tensor_parallel_group()
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return _as_megatron_calls(vocab_parallel_cross_entropy)


def _megatron_fused() -> Loss:
    group = _tensor_parallel_group()
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return _as_megatron_calls(lambda z, y: fused_vocab_parallel_cross_entropy(z, y, group))


def _liger(reduction: str) -> Callable[[], Loss]:
    def load() -> Loss:
        from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss

        loss: Loss = LigerCrossEntropyLoss(ignore_index=IGNORE, reduction=reduction)
        return loss

    return load


def _liger_vocab_parallel() -> Loss:
    from liger_kernel.transformers.vocab_parallel_cross_entropy import (
        LigerVocabParallelCrossEntropy,
    )

    cross_entropy = LigerVocabParallelCrossEntropy(ignore_index=IGNORE)
    return lambda logits, labels: cross_entropy(logits[:, None], labels[:, None])[:, 0]


def _transformer_engine() -> Loss:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        # label smoothing 0, one loss per token, no process group
        loss: Tensor = parallel_cross_entropy(
            logits[:, None], labels[:, None], 0.0, False, None, IGNORE
        )
        return loss.reshape(-1)

    return loss_of


PEERS = (
    Peer("megatron", "megatron-core vocab_parallel_cross_entropy", "megatron-core", _megatron,
         ("cpu", "cuda")),
    Peer("megatron-fused", "megatron-core fused_vocab_parallel_cross_entropy (compiled on CUDA)",
         "megatron-core", _megatron_fused, ("cpu", "cuda"), torch.bfloat16),
    Peer("liger", "LigerCrossEntropyLoss, sum alone (its fast path)", "liger-kernel",
         _liger("sum")),
    Peer("liger-per-token", "LigerCrossEntropyLoss, a loss per token", "liger-kernel",
         _liger("none")),
    Peer("liger-vocab-parallel", "LigerVocabParallelCrossEntropy", "liger-kernel",
         _liger_vocab_parallel),
    Peer("transformer-engine", "TransformerEngine parallel_cross_entropy", "transformer-engine",
         _transformer_engine),
)  # fmt: skip
