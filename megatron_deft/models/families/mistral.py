"""Mistral 7B, with or without its sliding window."""

from megatron_deft.models.families.reading import window_in_every_layer
from megatron_deft.models.families.rows import LLAMA
from megatron_deft.models.families.table import Family
from megatron_deft.models.families.values import optional, whole

FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    LLAMA,
    fields={
        "window": optional("sliding_window", whole),
        "window_layers": window_in_every_layer,
    },
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
