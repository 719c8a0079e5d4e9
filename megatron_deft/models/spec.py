"""The modules a decoder layer is made of: TransformerEngine's on a GPU that has it, else torch's.

Both tables build the same tree of modules, so parameter names and checkpoint keys are those of
megatron-core's local spec wherever the model runs. (TransformerEngine's usual spec fuses each norm
into the linear layer after it and renames the weight.)
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_deft.models.adapters import Adapters
from megatron_deft.models.attention import TorchAttention
from megatron_deft.models.families import ModelSpec
from megatron_deft.models.lora import adapted
from megatron_deft.models.modules import RMSNorm, with_bias, with_post_norm


@dataclass(frozen=True)
class Parts:
    """The classes a layer is assembled from."""

    norm: type
    column_linear: type
    row_linear: type
    attention: type


TORCH_PARTS = Parts(RMSNorm, ColumnParallelLinear, RowParallelLinear, TorchAttention)


@cache
def obstacle_to_transformer_engine() -> str:
    """Why TransformerEngine's parts are not used, or "" if they are.

    It raises RuntimeError, not ImportError, when it finds no driver or another torch.
    """
    if not torch.cuda.is_available():
        return "there is no GPU"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "transformer_engine":
            return "it is not installed"
        return f"it does not import: {error}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"it does not import: {error}"
    return ""


def has_transformer_engine() -> bool:
    """Whether there is a GPU and TransformerEngine imports on it."""
    return not obstacle_to_transformer_engine()


def parts() -> Parts:
    """TransformerEngine's parts where they work, else torch's."""
    if not has_transformer_engine():
        return TORCH_PARTS
    from megatron.core.extensions import transformer_engine as te

    return Parts(
        te.TENorm, te.TEColumnParallelLinear, te.TERowParallelLinear, te.TEDotProductAttention
    )


def layer_spec(
    tcfg: TransformerConfig,
    spec: ModelSpec,
    has_experts: bool = False,
    adapters: Adapters | None = None,
) -> ModuleSpec:
    """One pre-norm decoder layer of the model, with an MLP or with experts."""
    assert not tcfg.add_bias_linear, "biases are set one by one"
    use = parts()
    attention_out = with_bias(use.row_linear) if spec.attention_out_bias else use.row_linear
    mlp_out = with_bias(use.row_linear) if spec.mlp_bias else use.row_linear
    linears = {
        "linear_qkv": use.column_linear,
        "linear_proj": attention_out,
        "linear_fc1": with_bias(use.column_linear) if spec.mlp_bias else use.column_linear,
        "linear_fc2": mlp_out,
    }
    linears = adapted(linears, adapters)
    if spec.post_norms:  # around the adapters: they are part of what is normalised
        for name in ("linear_proj", "linear_fc2"):
            linears[name] = with_post_norm(linears[name], use.norm)
    mlp = ModuleSpec(
        module=MLP,
        params={"ffn_hidden_size": tcfg.ffn_hidden_size},
        submodules=MLPSubmodules(
            linear_fc1=linears["linear_fc1"],
            linear_fc2=linears["linear_fc2"],
        ),
    )
    if has_experts:
        mlp = get_moe_module_spec(use_te=has_transformer_engine(), num_experts=spec.experts)
        of_expert = mlp.submodules.experts.submodules
        for name, linear in adapted(vars(of_expert), adapters).items():
            setattr(of_expert, name, linear)
        # The router looks for it under this name even where TransformerEngine is not installed.
        moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    # TransformerEngine's attention has no cap on scores.
    attention: Any = use.attention
    if spec.attention_softcap is not None:
        attention = ModuleSpec(TorchAttention, params={"softcap": spec.attention_softcap})
    # Checkpoint keys of the local and the fused spec agree, as in megatron-core.
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not has_experts:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=use.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears["linear_qkv"],
                    core_attention=attention,
                    linear_proj=linears["linear_proj"],
                    q_layernorm=use.norm if spec.qk_norm else IdentityOp,
                    k_layernorm=use.norm if spec.qk_norm else IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=use.norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
        ),
    )


def block_spec(
    tcfg: TransformerConfig,
    spec: ModelSpec,
    vp_stage: int | None = None,
    adapters: Adapters | None = None,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm.

    megatron-core would take a single layer_spec too, but then choose a final norm of its own.
    """
    first = get_transformer_layer_offset(tcfg, vp_stage=vp_stage)
    layers = range(first, first + get_num_layers_to_build(tcfg, vp_stage=vp_stage))
    kinds = {
        has: layer_spec(tcfg, spec, has, adapters)
        for has in {i in spec.expert_layers for i in layers}
    }
    return TransformerBlockSubmodules(
        layer_specs=[kinds[i in spec.expert_layers] for i in layers], layer_norm=parts().norm
    )
