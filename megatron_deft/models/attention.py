"""Causal attention in plain torch, for machines without TransformerEngine and for what it lacks."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_deft.models.context_parallel import gather, held, in_order
from megatron_deft.models.packed import PackedParams

# config field -> the only value TorchAttention computes
ATTENTION_LIMITS: dict[str, Any] = {
    "softmax_type": "vanilla",
    "apply_query_key_layer_scaling": False,
}


class TorchAttention(MegatronModule):
    """Causal attention by torch.nn.functional.scaled_dot_product_attention.

    Takes the place of megatron-core's DotProductAttention, which holds the whole [b, heads, s, s]
    score matrix and needs an explicit causal mask. With a softcap this one holds it too: no fused
    kernel of torch caps scores. Packed documents are attended to one after another, neighbours of
    equal length together.

    config.context_parallel_size: documents cut as models/context_parallel.py says. Not with
        dropout: the ranks draw alike, and would drop the same places of different positions.
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
        if self.dropout and config.context_parallel_size > 1:
            raise NotImplementedError(
                f"TorchAttention: attention dropout {self.dropout} with context_parallel_size="
                f"{config.context_parallel_size}, only 0"
            )
        self.ranks, self.rank, self.group = 1, 0, None
        if config.context_parallel_size > 1:
            self.group = parallel_state.get_context_parallel_group()
            if pg_collection is not None:
                self.group = pg_collection.cp
            self.ranks, self.rank = self.group.size(), self.group.rank()
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
        """Attend causally, each row or packed document within itself.

        Args:
            query: [s, b, heads, head_dim], this rank's heads and positions, or packed [t, heads,
                head_dim].
            key, value: [s, b, groups, head_dim] or [t, groups, head_dim]; head i reads group
                i // (heads / groups).
            attention_mask, attention_bias: must be None; right padding needs no mask because no
                real token attends to what follows it.
            packed_seq_params: of models/packed.py; None for dense rows.

        Returns: [s, b, heads * head_dim] or [t, heads * head_dim].
        """
        refused = {
            "attention_mask": attention_mask is not None,
            "attention_bias": attention_bias is not None,
            "packed_seq_params but those of models/packed.py": not isinstance(
                packed_seq_params, PackedParams | None
            ),
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
                return self._attend(query, key, value, packed_seq_params, dropout)
        return self._attend(query, key, value, packed_seq_params, dropout)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packed: PackedParams | None,
        dropout: float,
    ) -> Tensor:
        keys, values = key[None], value[None]  # [ranks, s, ...]
        if self.group is not None:
            keys, values = gather(torch.stack([key, value], 1), self.group).unbind(2)
        if packed is None:
            keys, values = (t.transpose(1, 2) for t in (keys, values))
            context = self._attend_within(query.transpose(0, 1), keys, values, dropout)
            return context.transpose(0, 1).flatten(2)
        sizes = [number * length // self.ranks for number, length in packed.runs]
        runs = zip(
            packed.runs,
            query.split(sizes),  # and not slices, each of whose gradients is as long as the batch
            keys.split(sizes, 1),
            values.split(sizes, 1),
            strict=True,
        )
        contexts = [
            self._attend_within(
                q.unflatten(0, (number, -1)),
                k.unflatten(1, (number, -1)),
                v.unflatten(1, (number, -1)),
                dropout,
            ).flatten(0, 1)
            for (number, _), q, k, v in runs
        ]
        return torch.cat(contexts).flatten(1)

    def _attend_within(self, query: Tensor, keys: Tensor, values: Tensor, dropout: float) -> Tensor:
        """Documents of one length: query [documents, s, heads, head_dim], this rank's positions;
        keys, values [ranks, documents, s, groups, head_dim], every rank's; returns query's shape.
        """
        key, value = (t[0] if self.group is None else in_order(t) for t in (keys, values))
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # [b, n, s, hn]
        places = held(key.size(2), self.ranks, self.rank)
        queries = query.split([end - start for start, end in places], dim=2)
        contexts = []
        for (start, end), part in zip(places, queries, strict=True):
            seen = slice(0 if self.window is None else max(0, start + 1 - self.window), end)
            contexts.append(self._attend_last(part, key[:, :, seen], value[:, :, seen], dropout))
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts, dim=2)
        return context.transpose(1, 2)

    def _attend_last(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Queries [b, heads, q, head_dim] at the last q of the keys' positions [b, groups, k,
        head_dim]; returns query's shape."""
        length, places = query.size(2), key.size(2)
        is_cut = self.window is not None and places > self.window
        visible = None
        if self.softcap is not None or is_cut or length < places:
            visible = _visible(length, places, self.window, query.device)
        if self.softcap is not None:
            return self._attend_capped(query, key, value, visible, dropout)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            dropout_p=dropout,
            is_causal=visible is None,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )

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


def _visible(length: int, places: int, window: int | None, device: torch.device) -> Tensor:
    """[length, places] bool: whether query i, the last of them at the last place, attends to key j:
    the last `window` up to its own."""
    own = places - length
    mask = torch.ones(length, places, dtype=torch.bool, device=device).tril(own)
    return mask if window is None else mask.triu(own + 1 - window)
