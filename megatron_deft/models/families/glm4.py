"""GLM-4-0414, dense (9B and 32B): GLM with a norm after attention and after the MLP too."""

from megatron_deft.models.families.glm import DEFAULTS, FIELDS
from megatron_deft.models.families.rows import (
    ATTENTION,
    EMBEDDING,
    FINAL,
    MLP_DOWN,
    PACKED_MLP_UP,
    PRE_MLP_NORM,
    post_norms,
)
from megatron_deft.models.families.table import Family

FAMILY = Family(
    "glm4",
    "Glm4ForCausalLM",
    (
        EMBEDDING,
        *ATTENTION,
        PRE_MLP_NORM,
        PACKED_MLP_UP,
        MLP_DOWN,
        *post_norms("post_self_attn_layernorm", "post_mlp_layernorm"),
        *FINAL,
    ),
    fields={**FIELDS, "post_norms": True},
    defaults=DEFAULTS,
)
