"""A Hugging Face config.json -> ModelSpec.

Whatever the code cannot reproduce exactly is refused by name: a model that is almost right trains
without complaint and is wrong for ever.
"""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.models.families import rope
from megatron_deft.models.families.modelspec import ModelSpec
from megatron_deft.models.families.table import Config, Family, Refusal
from megatron_deft.models.families.values import (
    boolean,
    items,
    layers,
    positive,
    real,
    require,
    shown,
    whole,
)

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
    ("transformers_weights", lambda file: file is None, "absent: weights have their usual names"),
)


def activation(key: str) -> Callable[[Config], str]:
    """Reads the activation of the gated MLP from `key`."""

    def read(config: Config) -> str:
        name = config.get(key)
        found = ACTIVATIONS.get(name) if isinstance(name, str) else None
        if found is None:
            legal = ", ".join(ACTIVATIONS)
            raise UserError(f"config.json: {key} {shown(name)} is not supported: only {legal}")
        return found

    return read


def _head_dim(config: Config) -> int:
    if config["head_dim"] is not None:
        return whole(config, "head_dim")
    hidden, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
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
    kinds = sorted(set(items(config, "layer_types", str)))
    require(kinds in ([], ["full_attention"]), f"layer_types {shown(kinds)}: only full_attention")
    return ()


COMMON: Mapping[str, Callable[[Config], Any]] = {
    "num_layers": layers,
    "hidden_size": positive("hidden_size"),
    "ffn_hidden_size": positive("intermediate_size"),
    "num_attention_heads": positive("num_attention_heads"),
    "num_query_groups": positive("num_key_value_heads"),
    "head_dim": _head_dim,
    "vocab_size": positive("vocab_size"),
    "max_position_embeddings": positive("max_position_embeddings"),
    "rms_norm_eps": lambda config: real(config, "rms_norm_eps", most=1),
    "rope_theta": lambda config: rope.theta(config, rope.DEFAULT_THETA),
    "rope_scaling": rope.scaling,
    "rotary_fraction": _whole_heads,
    "attention_scale": _attention_scale,
    "tied_embeddings": lambda config: boolean(config, "tie_word_embeddings"),
    "qkv_bias": lambda config: False,
    "attention_out_bias": lambda config: False,
    "mlp_bias": lambda config: False,
    "initializer_range": lambda config: real(config, "initializer_range", zero=True, most=1),
    "activation": activation("hidden_act"),
    "window": lambda config: None,
    "window_layers": _no_window,
}


def window_in_every_layer(config: Config) -> tuple[int, ...]:
    """For families whose sliding_window, where there is one, is every layer's."""
    require(config.get("layer_types") is None, "layer_types is another family's key: remove it")
    return () if config["sliding_window"] is None else tuple(range(layers(config)))


def window_by_layer_types(
    is_windowed: Callable[[Config, int], bool],
) -> Callable[[Config], tuple[int, ...]]:
    """Layers with a sliding window: those of layer_types, or by `is_windowed` without that key."""

    def read(config: Config) -> tuple[int, ...]:
        count = layers(config)
        if config.get("layer_types") is None:
            return tuple(i for i in range(count) if is_windowed(config, i))
        kinds = items(config, "layer_types", str)
        require(
            len(kinds) == count and set(kinds) <= {"full_attention", "sliding_attention"},
            f"layer_types {shown(sorted(set(kinds)))} of {len(kinds)} layers is not supported: one "
            f"of full_attention, sliding_attention for each of {count} layers",
        )
        return tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")

    return read


def read_spec(family: Family, config: Config) -> ModelSpec:
    """The ModelSpec of a config of `family`. Errors: UserError for what is not reproduced."""
    architectures = items(config, "architectures", str)
    require(
        architectures in ([], [family.architecture]),
        f"architectures {shown(architectures)} is not supported: only {family.architecture}",
    )
    config = {**DEFAULTS, **family.defaults, **config}
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config.get("num_attention_heads")
    for key, is_fine, legal in (*REFUSALS, *family.refusals):
        value = config.get(key)
        require(is_fine(value), f"{key} {shown(value)} is not supported: only {legal}")
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
        spec.experts_per_token <= spec.experts,
        f"num_experts_per_tok is {spec.experts_per_token}, there are {spec.experts} experts",
    )
    require(
        spec.experts_per_token != 1 or not spec.normalise_expert_weights,
        "num_experts_per_tok 1 with normalised expert weights is not supported: megatron-core "
        "cannot give the one expert a weight of 1",
    )
    require(
        spec.rotary_dim % 2 == 0 and spec.rotary_dim > 0,
        f"{spec.rotary_dim} rotated dimensions of each head are not pairs",
    )
    require(
        spec.rotary_fraction == 1 or rope.attention_factor(spec.rope_scaling) == 1,
        "yarn with partial_rotary_factor is not supported: its attention_factor would scale the "
        "rotated part of each head alone",
    )
