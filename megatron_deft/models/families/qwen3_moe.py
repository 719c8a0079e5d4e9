"""Qwen3-MoE (Qwen3-30B-A3B and the like): experts in all layers, or in some."""

from megatron_deft.models.families.rows import (
    ATTENTION,
    EMBEDDING,
    FINAL,
    MLP_DOWN,
    MLP_UP,
    PRE_MLP_NORM,
    QK_NORMS,
    experts,
)
from megatron_deft.models.families.table import Config, Family
from megatron_deft.models.families.values import items, layers, positive, require, switch, whole


def _experts(config: Config) -> int:
    """num_experts to transformers 4, num_local_experts to transformers 5."""
    keys = ("num_experts", "num_local_experts")
    found = {whole(config, key) for key in keys if config.get(key) is not None}
    require(len(found) <= 1, f"num_experts and num_local_experts differ: {sorted(found)}")
    return found.pop() if found else 128


def _expert_layers(config: Config) -> tuple[int, ...]:
    step, without = whole(config, "decoder_sparse_step"), items(config, "mlp_only_layers", int)
    return tuple(i for i in range(layers(config)) if i not in without and (i + 1) % step == 0)


FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (
        EMBEDDING,
        *ATTENTION,
        *QK_NORMS,
        PRE_MLP_NORM,
        MLP_UP,
        MLP_DOWN,
        *experts(
            router="mlp.gate",
            gate="mlp.experts.{e}.gate_proj",
            up="mlp.experts.{e}.up_proj",
            down="mlp.experts.{e}.down_proj",
        ),
        *FINAL,
    ),
    fields={
        "qk_norm": True,
        "qkv_bias": switch("attention_bias"),
        "attention_out_bias": switch("attention_bias"),
        "experts": _experts,
        "experts_per_token": positive("num_experts_per_tok"),
        "expert_ffn_hidden_size": positive("moe_intermediate_size"),
        "expert_layers": _expert_layers,
        "normalise_expert_weights": switch("norm_topk_prob"),
    },
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "use_sliding_window": False,
    },
    refusals=(("use_sliding_window", lambda used: not used, "false"),),
)
