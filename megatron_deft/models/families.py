"""What a Hugging Face config says about a model, as one ModelSpec; one table row per family.

Knows no torch. Whatever the code cannot reproduce exactly is refused by name: a model that is
almost right trains without complaint and is wrong for ever.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_deft.errors import UserError


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of a Llama-like decoder: pre-norm RMSNorm, SwiGLU, rotary positions.

    Sizes are of the whole model, not of a tensor-parallel shard.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key/value heads
    head_dim: int
    vocab_size: int  # rows of the Hugging Face embedding, without Megatron's padding
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # {"rope_type": "linear" | "llama3", its parameters}
    tied_embeddings: bool
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    initializer_range: float

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict that json can write."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "ModelSpec":
        """The spec that to_json() wrote. Errors: UserError on a missing or unknown field."""
        names = {field.name for field in fields(ModelSpec)}
        if set(data) != names:
            raise UserError(
                f"model spec: missing fields {sorted(names - set(data))}, unknown fields "
                f"{sorted(set(data) - names)}: convert the model again with this version"
            )
        return ModelSpec(**data)


Refusal = tuple[str, Callable[[Any], bool], str]  # (config key, is the value fine?, what is legal)


@dataclass(frozen=True)
class Family:
    """How one model_type spells its differences.

    A bias is a constant or the config key that switches it. `defaults` holds what transformers
    assumes for an absent key where the family differs from DEFAULTS.
    """

    architecture: str
    qkv_bias: bool | str = False
    attention_out_bias: bool | str = False
    mlp_bias: bool | str = False
    defaults: Mapping[str, Any] | None = None
    refusals: tuple[Refusal, ...] = ()


# What transformers' LlamaConfig, MistralConfig and Qwen2Config assume for absent keys.
DEFAULTS: Mapping[str, Any] = {
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
DEFAULT_ROPE_THETA = 10000.0

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        qkv_bias="attention_bias",
        attention_out_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        refusals=(
            (
                "sliding_window",
                lambda window: window is None,
                "null (attention over the whole sequence); set it to null if none is longer",
            ),
        ),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
        refusals=(("use_sliding_window", lambda used: not used, "false"),),
    ),
}

REFUSALS: tuple[Refusal, ...] = (
    ("hidden_act", lambda act: act == "silu", "silu (SwiGLU)"),
    ("partial_rotary_factor", lambda factor: factor in (None, 1), "1 (rotate whole heads)"),
    (
        "layer_types",
        lambda kinds: kinds is None or set(kinds) == {"full_attention"},
        "full_attention in every layer",
    ),
    ("quantization_config", lambda config: config is None, "absent: start from whole weights"),
)

# rope_type -> its parameters; transformers.modeling_rope_utils has the formulas. dynamic, yarn and
# longrope scale with the sequence length or the attention, which megatron-core computes otherwise.
ROPE_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def spec_from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The ModelSpec of a Hugging Face config.json, as written by transformers 4 or 5.

    Absent keys mean what they mean to transformers. Errors: UserError for an unknown model_type and
    for anything that would not be reproduced exactly.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise UserError(f"config.json: model_type {model_type!r} is not one of {sorted(FAMILIES)}")
    family = FAMILIES[model_type]
    config = {**DEFAULTS, **(family.defaults or {}), **config}
    _refuse_what_differs(config, family)

    heads = _positive(config, "num_attention_heads")
    groups = heads if config["num_key_value_heads"] is None else config["num_key_value_heads"]
    config["num_key_value_heads"] = groups
    hidden = _positive(config, "hidden_size")
    if config["head_dim"] is None:
        _require(
            hidden % heads == 0,
            f"hidden_size {hidden} is not a multiple of {heads} heads",
        )
        config["head_dim"] = hidden // heads
    spec = ModelSpec(
        family=model_type,
        num_layers=_positive(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_positive(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=_positive(config, "num_key_value_heads"),
        head_dim=_positive(config, "head_dim"),
        vocab_size=_positive(config, "vocab_size"),
        max_position_embeddings=_positive(config, "max_position_embeddings"),
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope_theta=_rope_theta(config),
        rope_scaling=_rope_scaling(config),
        tied_embeddings=bool(config["tie_word_embeddings"]),
        qkv_bias=_bias(config, family.qkv_bias),
        attention_out_bias=_bias(config, family.attention_out_bias),
        mlp_bias=_bias(config, family.mlp_bias),
        initializer_range=float(config["initializer_range"]),
    )
    _require(heads % spec.num_query_groups == 0, f"{heads} heads do not divide by {groups} groups")
    _require(spec.head_dim % 2 == 0, f"head_dim {spec.head_dim} is odd: rotation needs pairs")
    return spec


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"config.json: {message}")


def _refuse_what_differs(config: Mapping[str, Any], family: Family) -> None:
    architectures = config.get("architectures") or [family.architecture]
    _require(
        list(architectures) == [family.architecture],
        f"architectures {architectures} is not supported: only {family.architecture}",
    )
    for key, is_fine, legal in (*REFUSALS, *family.refusals):
        value = config.get(key)
        _require(is_fine(value), f"{key} {value!r} is not supported: only {legal}")


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    _require(
        isinstance(value, int) and not isinstance(value, bool) and value > 0,
        f"{key} must be a positive integer, got {value!r}",
    )
    return int(config[key])


def _bias(config: Mapping[str, Any], switch: bool | str) -> bool:
    return bool(config[switch]) if isinstance(switch, str) else switch


def _rope_entries(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every place that may hold rotary parameters: transformers 5's first, then 4's two keys."""
    return [
        dict(config.get("rope_parameters") or {}),
        dict(config.get("rope_scaling") or {}),
        {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {},
    ]


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base; transformers 4 and 5 read different places, so two values must agree."""
    found = {
        float(e["rope_theta"]) for e in _rope_entries(config) if e.get("rope_theta") is not None
    }
    _require(
        len(found) <= 1,
        f"rope_theta is given as {sorted(found)}: transformers 4 and 5 would read different models",
    )
    return found.pop() if found else DEFAULT_ROPE_THETA


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling of rotary frequencies in one spelling; None when they are not scaled."""
    found: list[dict[str, Any] | None] = []
    for entry in _rope_entries(config)[:2]:
        if not entry:
            continue
        rope_type = entry.get("rope_type", entry.get("type", "default"))
        _require(
            isinstance(rope_type, str) and rope_type in ROPE_PARAMETERS,
            f"rope_type {rope_type!r} is not supported: only {sorted(ROPE_PARAMETERS)}",
        )
        nested = sorted(key for key, value in entry.items() if isinstance(value, dict))
        _require(not nested, f"rope_parameters per layer type {nested} are not supported")
        factor = entry.get("partial_rotary_factor")
        _require(factor in (None, 1), f"partial_rotary_factor {factor} is not supported: only 1")
        found.append(_scaling_parameters(rope_type, entry, config))
    _require(
        all(scaling == found[0] for scaling in found),
        "rope_scaling and rope_parameters differ: transformers 4 and 5 would read different models",
    )
    return found[0] if found else None


def _scaling_parameters(
    rope_type: str, entry: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    if rope_type == "default":
        return None
    # transformers 5 falls back to these for the length the model was pretrained with.
    entry = {
        "original_max_position_embeddings": config["max_position_embeddings"],
        **entry,
    }
    missing = [name for name in ROPE_PARAMETERS[rope_type] if entry.get(name) is None]
    _require(not missing, f"rope_type {rope_type!r} lacks {missing}")
    return {"rope_type": rope_type, **{name: entry[name] for name in ROPE_PARAMETERS[rope_type]}}
