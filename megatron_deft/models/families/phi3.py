"""Phi-3 and Phi-4 with rotary angles that do not depend on the length (4k and 16k, no longrope)."""

from megatron_deft.models.families import rope
from megatron_deft.models.families.reading import window_in_every_layer
from megatron_deft.models.families.rows import (
    ATTENTION_OUT,
    EMBEDDING,
    FINAL,
    INPUT_NORM,
    MLP_DOWN,
    PACKED_MLP_UP,
    PACKED_QKV,
    PRE_MLP_NORM,
)
from megatron_deft.models.families.table import Family
from megatron_deft.models.families.values import optional, whole

FAMILY = Family(
    "phi3",
    "Phi3ForCausalLM",
    (
        EMBEDDING,
        INPUT_NORM,
        PACKED_QKV,
        *ATTENTION_OUT,
        PRE_MLP_NORM,
        PACKED_MLP_UP,
        MLP_DOWN,
        *FINAL,
    ),
    fields={
        "rope_scaling": rope.unscaled,  # longrope, once spelt su or yarn
        "rotary_fraction": lambda config: rope.fraction(config, 1.0),
        "window": optional("sliding_window", whole),
        "window_layers": window_in_every_layer,
    },
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    refusals=(
        ("attention_bias", lambda used: not used, "false"),
        ("resid_pdrop", lambda p: not p, "0: dropout is a setting of the training run"),
        ("embd_pdrop", lambda p: not p, "0: dropout is a setting of the training run"),
    ),
)
