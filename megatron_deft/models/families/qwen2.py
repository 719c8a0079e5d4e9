"""Qwen2, Qwen2.5 and Qwen2.5-Math."""

from megatron_deft.models.families.reading import window_by_layer_types
from megatron_deft.models.families.rows import LLAMA
from megatron_deft.models.families.table import Config, Family
from megatron_deft.models.families.values import boolean, optional, whole

WINDOW_DEFAULTS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


def window(config: Config) -> int | None:
    """sliding_window counts only where it is switched on."""
    used = boolean(config, "use_sliding_window")
    return optional("sliding_window", whole)(config) if used else None


def is_windowed(config: Config, layer: int) -> bool:
    """The layers from max_window_layers on have the window, where one is used."""
    return window(config) is not None and layer >= whole(config, "max_window_layers", least=0)


FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    LLAMA,
    fields={
        "qkv_bias": True,
        "window": window,
        "window_layers": window_by_layer_types(is_windowed),
    },
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768, **WINDOW_DEFAULTS},
)
