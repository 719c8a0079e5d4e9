"""GLM-4-9B in transformers' own format (glm-4-9b-chat-hf): half of each head is rotated, in
neighbouring pairs."""

from megatron_deft.models.families import rope
from megatron_deft.models.families.rows import (
    ATTENTION,
    EMBEDDING,
    FINAL,
    MLP_DOWN,
    PACKED_MLP_UP,
    PRE_MLP_NORM,
)
from megatron_deft.models.families.table import Family
from megatron_deft.models.families.values import switch

FIELDS = {
    "qkv_bias": switch("attention_bias"),
    "rotary_interleaved": True,
    "rotary_fraction": lambda config: rope.fraction(config, 0.5),
}
DEFAULTS = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 0.00000015625,
    "attention_bias": True,
}

FAMILY = Family(
    "glm",
    "GlmForCausalLM",
    (EMBEDDING, *ATTENTION, PRE_MLP_NORM, PACKED_MLP_UP, MLP_DOWN, *FINAL),
    fields=FIELDS,
    defaults=DEFAULTS,
)
