"""Modules that megatron-core lacks or refuses: the norm, biases one by one, norms after a layer."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_deft.platform import device


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (arXiv 1910.07467).

    With config.layernorm_zero_centered_gamma the factor is 1 + weight, all in float32 (Gemma).
    Statistics in float32; output in x's dtype. megatron-core's torch norm refuses sequence
    parallelism for want of one attribute: under it every tensor-parallel rank normalises its own
    part of the sequence, and finalize_model_grads sums the gradients of parameters so marked.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.plus_one = config.layernorm_zero_centered_gamma
        initial = torch.zeros if self.plus_one else torch.ones
        self.weight = torch.nn.Parameter(
            initial(hidden_size, dtype=config.params_dtype, device=device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise hidden_states [..., hidden]; same shape and dtype out."""
        shape = self.weight.shape
        if self.plus_one:
            weight = 1.0 + self.weight.float()
            return F.rms_norm(hidden_states.float(), shape, weight, self.eps).type_as(hidden_states)
        return F.rms_norm(hidden_states, shape, self.weight, self.eps)


@cache
def with_bias(linear: type) -> type:
    """`linear` with a bias whatever megatron-core asks for.

    megatron-core has two switches, qkv alone or every linear layer; Hugging Face has three.
    """

    class Biased(linear):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "bias": True})

    Biased.__name__ = Biased.__qualname__ = f"Biased{linear.__name__}"
    return Biased


@cache
def with_post_norm(linear: type, norm: type) -> type:
    """`linear` (row parallel) whose output is normalised: its last step before the residual sum.

    megatron-core's layer has no place of its own for such a norm.
    """

    class Normed(linear):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            assert not kwargs.get("bias"), "a bias would be added after the norm"
            config = kwargs["config"]
            size = config.hidden_size
            self.post_norm = norm(config=config, hidden_size=size, eps=config.layernorm_epsilon)

        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            output, bias = super().forward(*args, **kwargs)
            assert bias is None
            return self.post_norm(output), None

    Normed.__name__ = Normed.__qualname__ = f"Normed{linear.__name__}"
    return Normed
