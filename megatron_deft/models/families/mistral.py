"""Mistral 7B, with or without its sliding window."""

from megatron_deft.models.families.reading import window_in_every_layer
from megatron_deft.models.families.rows import LLAMA
from megatron_deft.models.families.table import Family

FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    LLAMA,
    fields={
        "window": lambda config: config["sliding_window"],
        "window_layers": window_in_every_layer,
    },
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
