"""Gated fine-tuning objectives on megatron-core, with fused vocab-parallel kernels.

`token_loss` works in plain PyTorch, and so does `fused_linear_loss`, which takes hidden states and
the head's weight instead of logits; `attach` makes a megatron-core model train with an objective.
The names load on first use, so that `import megatron_deft` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "attach",
    "fused_linear_loss",
    "objectives",
    "reduce_loss",
    "token_loss",
]

_HOMES = {
    "attach": "megatron_deft.loss.attach",
    "fused_linear_loss": "megatron_deft.loss.fused_linear",
    "token_loss": "megatron_deft.loss.vocab_parallel",
    "reduce_loss": "megatron_deft.loss.reduction",
}

if TYPE_CHECKING:
    from megatron_deft import objectives
    from megatron_deft.loss.attach import attach
    from megatron_deft.loss.fused_linear import fused_linear_loss
    from megatron_deft.loss.reduction import reduce_loss
    from megatron_deft.loss.vocab_parallel import token_loss


def __getattr__(name: str) -> Any:
    if name == "objectives":
        return import_module("megatron_deft.objectives")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'megatron_deft' has no attribute {name!r}")
