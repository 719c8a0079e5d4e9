"""Qwen3, the dense ones: query and key are normalised head by head."""

from megatron_deft.models.families.qwen2 import WINDOW_DEFAULTS, is_windowed, window
from megatron_deft.models.families.reading import window_by_layer_types
from megatron_deft.models.families.rows import ATTENTION, EMBEDDING, FINAL, MLP, PRE_MLP_NORM
from megatron_deft.models.families.rows import QK_NORMS as NORMS
from megatron_deft.models.families.table import Family
from megatron_deft.models.families.values import switch

FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    (EMBEDDING, *ATTENTION, *NORMS, PRE_MLP_NORM, *MLP, *FINAL),
    fields={
        "qk_norm": True,
        "qkv_bias": switch("attention_bias"),
        "attention_out_bias": switch("attention_bias"),
        "window": window,
        "window_layers": window_by_layer_types(is_windowed),
    },
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        **WINDOW_DEFAULTS,
    },
)
