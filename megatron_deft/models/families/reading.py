"""A Hugging Face config.json -> ModelSpec.

Whatever the code cannot reproduce exactly is refused by name: a model that is almost right trains
without complaint and is wrong for ever.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_deft.models.families import rope
from megatron_deft.models.families.modelspec import ModelSpec
from megatron_deft.models.families.rope import require
from megatron_deft.models.families.table import Config, Family, Refusal

# What the config classes of most families assume for absent keys.
DEFAULTS: Config = {
    "num_key_value_heads": None,  # as many as attention heads
    "head_dim": None,  # hidden_size / heads
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

REFUSALS: tuple[Refusal, ...] = (
    ("quantization_config", lambda config: config is None, "absent: start from whole weights"),
)

# For families whose class knows no scaling, or means something else by the same name.
UNSCALED_ROPE: tuple[Refusal, ...] = tuple(
    (
        key,
        lambda entry: not entry or entry.get("rope_type", entry.get("type")) in (None, "default"),
        "of rope_type default",
    )
    for key in ("rope_parameters", "rope_scaling")
)


def activation(key: str) -> Callable[[Config], str]:
    """Reads the activation of the gated MLP from `key`."""

    def read(config: Config) -> str:
        name = config.get(key)
        require(
            name in ACTIVATIONS, f"{key} {name!r} is not supported: only {', '.join(ACTIVATIONS)}"
        )
        return ACTIVATIONS[str(name)]

    return read


def positive(key: str) -> Callable[[Config], int]:
    """Reads a positive integer."""

    def read(config: Config) -> int:
        value = config.get(key)
        require(
            isinstance(value, int) and not isinstance(value, bool) and value > 0,
            f"{key} must be a positive integer, got {value!r}",
        )
        return int(config[key])

    return read


def _head_dim(config: Config) -> int:
    if config["head_dim"] is not None:
        return positive("head_dim")(config)
    hidden, heads = positive("hidden_size")(config), positive("num_attention_heads")(config)
    require(hidden % heads == 0, f"hidden_size {hidden} is not a multiple of {heads} heads")
    return hidden // heads


def _whole_heads(config: Config) -> float:
    fraction = rope.fraction(config, 1.0)
    require(fraction == 1, f"partial_rotary_factor {fraction} is not supported: only 1")
    return fraction


def _attention_scale(config: Config) -> float | None:
    # yarn multiplies cosines and sines of query and key alike, so it multiplies their product
    factor = rope.attention_factor(rope.scaling(config))
    return None if factor == 1 else factor**2 / _head_dim(config) ** 0.5


def _no_window(config: Config) -> tuple[int, ...]:
    kinds = set(config.get("layer_types") or ())
    require(kinds <= {"full_attention"}, f"layer_types {sorted(kinds)}: only full_attention")
    return ()


COMMON: Mapping[str, Callable[[Config], Any]] = {
    "num_layers": positive("num_hidden_layers"),
    "hidden_size": positive("hidden_size"),
    "ffn_hidden_size": positive("intermediate_size"),
    "num_attention_heads": positive("num_attention_heads"),
    "num_query_groups": positive("num_key_value_heads"),
    "head_dim": _head_dim,
    "vocab_size": positive("vocab_size"),
    "max_position_embeddings": positive("max_position_embeddings"),
    "rms_norm_eps": lambda config: float(config["rms_norm_eps"]),
    "rope_theta": lambda config: rope.theta(config, rope.DEFAULT_THETA),
    "rope_scaling": rope.scaling,
    "rotary_fraction": _whole_heads,
    "attention_scale": _attention_scale,
    "tied_embeddings": lambda config: bool(config["tie_word_embeddings"]),
    "qkv_bias": lambda config: False,
    "attention_out_bias": lambda config: False,
    "mlp_bias": lambda config: False,
    "initializer_range": lambda config: float(config["initializer_range"]),
    "activation": activation("hidden_act"),
    "window": lambda config: None,
    "window_layers": _no_window,
}


def switch(key: str) -> Callable[[Config], bool]:
    """Reads a boolean."""
    return lambda config: bool(config[key])


def window_in_every_layer(config: Config) -> tuple[int, ...]:
    """For families whose sliding_window, where there is one, is every layer's."""
    require(config.get("layer_types") is None, "layer_types is another family's key: remove it")
    layers = positive("num_hidden_layers")(config)
    return () if config["sliding_window"] is None else tuple(range(layers))


def window_by_layer_types(
    is_windowed: Callable[[Config, int], bool],
) -> Callable[[Config], tuple[int, ...]]:
    """Layers with a sliding window: those of layer_types, or by `is_windowed` without that key."""

    def read(config: Config) -> tuple[int, ...]:
        layers = positive("num_hidden_layers")(config)
        if (kinds := config.get("layer_types")) is None:
            return tuple(i for i in range(layers) if is_windowed(config, i))
        require(
            len(kinds) == layers and set(kinds) <= {"full_attention", "sliding_attention"},
            f"layer_types {sorted(set(kinds))} of {len(kinds)} layers is not supported: one of "
            f"full_attention, sliding_attention for each of {layers} layers",
        )
        return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")

    return read


def read_spec(family: Family, config: Config) -> ModelSpec:
    """The ModelSpec of a config of `family`. Errors: UserError for what is not reproduced."""
    architectures = config.get("architectures") or [family.architecture]
    require(
        list(architectures) == [family.architecture],
        f"architectures {architectures} is not supported: only {family.architecture}",
    )
    config = {**DEFAULTS, **family.defaults, **config}
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")
    for key, is_fine, legal in (*REFUSALS, *family.refusals):
        value = config.get(key)
        require(is_fine(value), f"{key} {value!r} is not supported: only {legal}")
    read = {
        name: value(config) if callable(value) else value
        for name, value in {**COMMON, **family.fields}.items()
    }
    require(
        not read["window_layers"] or read["window"] is not None,
        "layer_types has sliding_attention, but sliding_window is null or not used",
    )
    if not read["window_layers"]:
        read["window"] = None
    spec = ModelSpec(family=family.model_type, **read)
    _check(spec)
    return spec


def _check(spec: ModelSpec) -> None:
    heads, groups = spec.num_attention_heads, spec.num_query_groups
    require(heads % groups == 0, f"{heads} heads do not divide by {groups} groups")
    require(
        spec.rotary_dim % 2 == 0 and spec.rotary_dim > 0,
        f"{spec.rotary_dim} rotated dimensions of each head are not pairs",
    )
    require(
        spec.rotary_fraction == 1 or rope.attention_factor(spec.rope_scaling) == 1,
        "yarn with partial_rotary_factor is not supported: its attention_factor would scale the "
        "rotated part of each head alone",
    )
