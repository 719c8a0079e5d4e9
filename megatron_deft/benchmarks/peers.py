"""Other packages' cross-entropies, each loaded when it is measured and not before."""

from __future__ import annotations

import importlib.util
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


def megatron_head() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """megatron-core's output layer and fused cross-entropy.

    returns: (hidden [N, H], weight [V, H], labels [N]) -> loss [N], nll
    """
    group = _tensor_parallel_group()
    from megatron.core import ModelParallelConfig
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import ColumnParallelLinear

    # Apex's products into main_grad, where Apex is; without it DistributedDataParallel adds
    is_fused = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    config = ModelParallelConfig(gradient_accumulation_fusion=is_fused)
    cross_entropy = _as_megatron_calls(
        lambda logits, labels: fused_vocab_parallel_cross_entropy(logits, labels, group)
    )
    layers: dict[torch.Size, Any] = {}

    def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        layer = layers.get(weight.shape)
        if layer is None:
            layer = layers[weight.shape] = ColumnParallelLinear(
                weight.shape[1],
                weight.shape[0],
                config=config,
                init_method=lambda weight: None,
                bias=False,
                skip_weight_param_allocation=True,
                tp_group=group,
            )
        logits, _ = layer(hidden[:, None], weight)
        return cross_entropy(logits.flatten(0, 1), labels)

    return loss_of
