"""The rotary parameters of a config.json, as transformers 4 or 5 wrote them, in one spelling."""

from collections.abc import Mapping
from math import log
from typing import Any

from megatron_deft.errors import UserError

DEFAULT_THETA = 10000.0

# rope_type -> its parameters, with the value that an absent one has (REQUIRED: none);
# transformers.modeling_rope_utils has the formulas. dynamic and longrope change the angles with the
# length of the sequence: they are refused.
REQUIRED = object()
PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "linear": {"factor": REQUIRED},
    "llama3": {
        "factor": REQUIRED,
        "low_freq_factor": REQUIRED,
        "high_freq_factor": REQUIRED,
        "original_max_position_embeddings": REQUIRED,
    },
    "yarn": {
        "factor": REQUIRED,
        "original_max_position_embeddings": REQUIRED,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
        "attention_factor": None,
        "mscale": None,
        "mscale_all_dim": None,
    },
}


def require(condition: bool, message: str) -> None:
    """Raise UserError about the config unless `condition`."""
    if not condition:
        raise UserError(f"config.json: {message}")


def theta(config: Mapping[str, Any], default: float) -> float:
    """The rotary base; transformers 4 and 5 read different places, so two values must agree."""
    return float(_one(config, "rope_theta", default))


def fraction(config: Mapping[str, Any], default: float) -> float:
    """The rotated fraction of each head, from wherever it is written."""
    value = float(_one(config, "partial_rotary_factor", default))
    require(0 < value <= 1, f"partial_rotary_factor {value} is not in (0, 1]")
    return value


def scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling of rotary frequencies in one spelling; None when they are not scaled."""
    found = [_parameters(entry, config) for entry in _entries(config)[:2] if entry]
    require(
        all(entry == found[0] for entry in found),
        "rope_scaling and rope_parameters differ: transformers 4 and 5 would read different models",
    )
    return found[0] if found else None


def attention_factor(scaling: Mapping[str, Any] | None) -> float:
    """What yarn multiplies cosines and sines by (arXiv 2309.00071, section 3.4); 1 otherwise."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling["attention_factor"] is not None:
        return float(scaling["attention_factor"])
    factor, mscale, of_all = (scaling[k] for k in ("factor", "mscale", "mscale_all_dim"))

    def scale(mscale: float) -> float:
        return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(of_all) if mscale and of_all else scale(1.0)


def _entries(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every place that may hold rotary parameters: transformers 5's first, then 4's two."""
    return [
        dict(config.get("rope_parameters") or {}),
        dict(config.get("rope_scaling") or {}),
        {key: config.get(key) for key in ("rope_theta", "partial_rotary_factor")},
    ]


def _one(config: Mapping[str, Any], key: str, default: float) -> float:
    found = {float(e[key]) for e in _entries(config) if e.get(key) is not None}
    require(
        len(found) <= 1,
        f"{key} is given as {sorted(found)}: transformers 4 and 5 would read different models",
    )
    return found.pop() if found else default


def _parameters(entry: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    rope_type = entry.get("rope_type", entry.get("type", "default"))
    require(
        isinstance(rope_type, str) and rope_type in PARAMETERS,
        f"rope_type {rope_type!r} is not supported: only {sorted(PARAMETERS)}",
    )
    nested = sorted(key for key, value in entry.items() if isinstance(value, dict))
    require(not nested, f"rope_parameters per layer type {nested} are not supported")
    if rope_type == "default":
        return None
    # transformers 5 falls back to these for the length the model was pretrained with.
    entry = {"original_max_position_embeddings": config["max_position_embeddings"], **entry}
    wanted = PARAMETERS[rope_type]
    missing = [k for k, v in wanted.items() if v is REQUIRED and entry.get(k) is None]
    require(not missing, f"rope_type {rope_type!r} lacks {missing}")
    values = {k: v if entry.get(k) is None else entry[k] for k, v in wanted.items()}
    return {"rope_type": rope_type, **values}
