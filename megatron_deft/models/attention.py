"""Causal attention in plain torch, for machines without TransformerEngine and for what it lacks."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

# config field -> the only value TorchAttention computes
ATTENTION_LIMITS: dict[str, Any] = {
    "context_parallel_size": 1,
    "softmax_type": "vanilla",
    "apply_query_key_layer_scaling": False,
}


class TorchAttention(MegatronModule):
    """Causal attention by torch.nn.functional.scaled_dot_product_attention.

    Takes the place of megatron-core's DotProductAttention, which holds the whole [b, heads, s, s]
    score matrix and needs an explicit causal mask. With a softcap this one holds it too: no fused
    kernel of torch caps scores.

    config.window_size (n - 1, 0): a token attends to n tokens, itself among them, in the layers
        that config.window_attn_skip_freq marks
    softcap: scores become softcap * tanh(score / softcap) before the softmax
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__(config=config)
        for name, value in ATTENTION_LIMITS.items():
            if (found := getattr(config, name)) != value:
                raise NotImplementedError(f"TorchAttention: {name}={found!r}, only {value!r}")
        if config.window_size is not None and config.window_size[1] != 0:
            raise NotImplementedError(
                f"TorchAttention: window_size {config.window_size}, not causal"
            )
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise NotImplementedError(
                f"TorchAttention: {attention_type} attention with a {attn_mask_type.name} mask, "
                "only causal self attention"
            )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(head_dim)
        self.softcap = softcap
        skip = config.window_attn_skip_freq
        has_window = is_layer_window_attention(config.window_size, skip, layer_number)
        self.window = config.window_size[0] + 1 if has_window else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend causally.

        Args:
            query: [s, b, heads, head_dim], this rank's heads.
            key, value: [s, b, groups, head_dim]; head i reads group i // (heads / groups).
            attention_mask, attention_bias, packed_seq_params: must be None; right padding needs no
                mask because no real token attends to what follows it.

        Returns: [s, b, heads * head_dim].
        """
        refused = {
            "attention_mask": attention_mask is not None,
            "attention_bias": attention_bias is not None,
            "packed_seq_params": packed_seq_params is not None,
            "attn_mask_type": attn_mask_type not in (None, AttnMaskType.causal),
            "a key/value cache": query.size(0) != key.size(0),
        }
        if any(refused.values()):
            names = [name for name, is_refused in refused.items() if is_refused]
            raise NotImplementedError(f"TorchAttention is causal only and takes no {names}")
        dropout = self.dropout if self.training else 0.0
        if dropout and not self.config.sequence_parallel:
            # Heads differ between tensor-parallel ranks, so must their dropout.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return self._attend(query, key, value, dropout)
        return self._attend(query, key, value, dropout)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))  # [b, n, s, hn]
        length = query.size(2)
        visible = None
        if self.softcap is not None or (self.window is not None and length > self.window):
            visible = _visible(length, self.window, query.device)
        if self.softcap is not None:
            context = self._attend_capped(query, key, value, visible, dropout)
        else:
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=visible,
                dropout_p=dropout,
                is_causal=visible is None,
                scale=self.softmax_scale,
                enable_gqa=query.size(1) != key.size(1),
            )
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend_capped(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, dropout: float
    ) -> Tensor:
        assert self.softcap is not None
        assert visible is not None
        repeats = query.size(1) // key.size(1)
        key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        scale = query.size(-1) ** -0.5 if self.softmax_scale is None else self.softmax_scale
        scores = torch.matmul(query, key.transpose(2, 3)) * scale
        scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~visible, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        return torch.matmul(F.dropout(weights, dropout), value)


def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """[s, s] bool: whether query i attends to key j, the last `window` up to i."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)
