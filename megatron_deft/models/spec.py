"""The modules a decoder layer is made of: TransformerEngine's on a GPU that has it, else torch's.

Both tables build the same tree of modules, so parameter names and checkpoint keys are those of
megatron-core's local spec wherever the model runs. (TransformerEngine's usual spec fuses each norm
into the linear layer after it and renames the weight.)
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_deft.platform import device


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension (arXiv 1910.07467).

    Statistics in float32; output in x's dtype. megatron-core's torch norm refuses sequence
    parallelism for want of one attribute: under it every tensor-parallel rank normalises its own
    part of the sequence, and finalize_model_grads sums the gradients of parameters so marked.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise hidden_states [..., hidden]; same shape and dtype out."""
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


# config field -> the only value TorchAttention computes
ATTENTION_LIMITS: dict[str, Any] = {
    "context_parallel_size": 1,
    "window_size": None,
    "softmax_type": "vanilla",
    "apply_query_key_layer_scaling": False,
}


class TorchAttention(MegatronModule):
    """Causal attention by torch.nn.functional.scaled_dot_product_attention.

    Takes the place of megatron-core's DotProductAttention, which holds the whole [b, heads, s, s]
    score matrix and needs an explicit causal mask.
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
    ) -> None:
        super().__init__(config=config)
        for name, value in ATTENTION_LIMITS.items():
            if (found := getattr(config, name)) != value:
                raise NotImplementedError(f"TorchAttention: {name}={found!r}, only {value!r}")
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise NotImplementedError(
                f"TorchAttention: {attention_type} attention with a {attn_mask_type.name} mask, "
                "only causal self attention"
            )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(head_dim)

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
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=dropout,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return context.permute(2, 0, 1, 3).flatten(2)


@dataclass(frozen=True)
class Parts:
    """The classes a layer is assembled from."""

    norm: type
    column_linear: type
    row_linear: type
    attention: type


TORCH_PARTS = Parts(RMSNorm, ColumnParallelLinear, RowParallelLinear, TorchAttention)


@cache
def has_transformer_engine() -> bool:
    """Whether there is a GPU and TransformerEngine imports on it.

    It raises RuntimeError, not ImportError, when it finds no driver or another torch.
    """
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def parts() -> Parts:
    """TransformerEngine's parts where they work, else torch's."""
    if not has_transformer_engine():
        return TORCH_PARTS
    from megatron.core.extensions import transformer_engine as te

    return Parts(
        te.TENorm, te.TEColumnParallelLinear, te.TERowParallelLinear, te.TEDotProductAttention
    )


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


def layer_spec(
    tcfg: TransformerConfig, *, attention_out_bias: bool = False, mlp_bias: bool = False
) -> ModuleSpec:
    """One pre-norm decoder layer; the qkv bias is `tcfg.add_qkv_bias`."""
    assert not tcfg.add_bias_linear, "biases are set one by one"
    use = parts()
    mlp_column, mlp_row = (
        with_bias(linear) if mlp_bias else linear for linear in (use.column_linear, use.row_linear)
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=use.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=use.column_linear,
                    core_attention=use.attention,
                    linear_proj=with_bias(use.row_linear) if attention_out_bias else use.row_linear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=use.norm,
            mlp=ModuleSpec(
                module=MLP,
                params={"ffn_hidden_size": tcfg.ffn_hidden_size},
                submodules=MLPSubmodules(linear_fc1=mlp_column, linear_fc2=mlp_row),
            ),
            mlp_bda=get_bias_dropout_add,
            # Checkpoint keys of the local and the fused spec agree, as in megatron-core.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def block_spec(
    tcfg: TransformerConfig, *, attention_out_bias: bool = False, mlp_bias: bool = False
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm.

    megatron-core would take a single layer_spec too, but then choose a final norm of its own.
    """
    layer = layer_spec(tcfg, attention_out_bias=attention_out_bias, mlp_bias=mlp_bias)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(tcfg), layer_norm=parts().norm
    )
