"""The rotary parameters of a config.json, as transformers 4 or 5 wrote them, in one spelling."""

from collections.abc import Callable, Mapping
from functools import partial
from math import log
from typing import Any

from megatron_deft.models.families.table import Config
from megatron_deft.models.families.values import boolean, real, require, shown, table, whole

DEFAULT_THETA = 10000.0

Read = Callable[[Config, str], Any]

# rope_type -> its parameters: how each is read, and the value that an absent one has (REQUIRED:
# none); transformers.modeling_rope_utils has the formulas. dynamic and longrope change the angles
# with the length of the sequence: they are refused.
REQUIRED = object()
KEYS = ("rope_parameters", "rope_scaling")  # of transformers 5 and of 4
ORIGINAL = "original_max_position_embeddings"
PARAMETERS: Mapping[str, Mapping[str, tuple[Read, Any]]] = {
    "default": {},
    "linear": {"factor": (real, REQUIRED)},
    "llama3": {
        "factor": (real, REQUIRED),
        "low_freq_factor": (real, REQUIRED),
        "high_freq_factor": (real, REQUIRED),
        ORIGINAL: (whole, REQUIRED),
    },
    "yarn": {
        "factor": (real, REQUIRED),
        ORIGINAL: (whole, REQUIRED),
        "beta_fast": (real, 32.0),
        "beta_slow": (real, 1.0),
        "truncate": (boolean, True),
        "attention_factor": (real, None),
        "mscale": (partial(real, zero=True), None),
        "mscale_all_dim": (partial(real, zero=True), None),
    },
}


def theta(config: Config, default: float) -> float:
    """The rotary base; transformers 4 and 5 read different places, so two values must agree."""
    value = _one(config, "rope_theta", default)
    require(value > 1, f"rope_theta must be above 1, got {value}")
    return value


def fraction(config: Config, default: float) -> float:
    """The rotated fraction of each head, from wherever it is written."""
    value = _one(config, "partial_rotary_factor", default)
    require(value <= 1, f"partial_rotary_factor {value} is not in (0, 1]")
    return value


def scaling(config: Config) -> dict[str, Any] | None:
    """The scaling of rotary frequencies in one spelling; None when they are not scaled."""
    written = {key: table(config, key) for key in KEYS}
    found = [_parameters(key, entry, config) for key, entry in written.items() if entry]
    require(
        all(entry == found[0] for entry in found),
        "rope_scaling and rope_parameters differ: transformers 4 and 5 would read different models",
    )
    return found[0] if found else None


def unscaled(config: Config) -> dict[str, Any] | None:
    """scaling() for families whose class knows none, or means something else by the same name."""
    for key in KEYS:
        kind = _rope_type(table(config, key))
        require(
            kind in (None, "default"),
            f"{key} of rope_type {shown(kind)} is not supported: only of rope_type default",
        )
    return scaling(config)


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


def _rope_type(entry: Config) -> Any:
    return entry.get("rope_type", entry.get("type", "default"))


def _one(config: Config, key: str, default: float) -> float:
    """The one value of all places: transformers 5's, and the two of 4."""
    places: list[Config] = [*(table(config, place) for place in KEYS), config]
    found = {real(place, key) for place in places if place.get(key) is not None}
    require(
        len(found) <= 1,
        f"{key} is given as {sorted(found)}: transformers 4 and 5 would read different models",
    )
    return found.pop() if found else default


def _parameters(key: str, entry: Config, config: Config) -> dict[str, Any] | None:
    rope_type = _rope_type(entry)
    require(
        isinstance(rope_type, str) and rope_type in PARAMETERS,
        f"rope_type {shown(rope_type)} is not supported: only {sorted(PARAMETERS)}",
    )
    nested = sorted(name for name, value in entry.items() if isinstance(value, dict))
    require(not nested, f"{key} per layer type {shown(nested)} are not supported")
    wanted = PARAMETERS[rope_type]
    if not wanted:
        return None
    if ORIGINAL in wanted:
        entry = {**entry, ORIGINAL: _original_length(rope_type, entry, config)}
    missing = [k for k, (_, v) in wanted.items() if v is REQUIRED and entry.get(k) is None]
    require(not missing, f"rope_type {rope_type!r} lacks {missing}")
    values = {
        k: default if entry.get(k) is None else read(entry, k)
        for k, (read, default) in wanted.items()
    }
    return {"rope_type": rope_type, **values}


def _original_length(rope_type: str, entry: Config, config: Config) -> int:
    """The length that the model was pretrained with.

    transformers 5 takes the key beside the parameters first, then the one among them, then
    max_position_embeddings. 4 does not look beside them, and fails for llama3 where none is among
    them.
    """
    inside = entry.get(ORIGINAL) is not None
    among = whole(entry, ORIGINAL) if inside else whole(config, "max_position_embeddings")
    if ORIGINAL not in config:
        return among
    beside = whole(config, ORIGINAL)
    only_5 = rope_type == "llama3" and not inside
    require(
        beside == among or only_5,
        f"{ORIGINAL} is {beside} beside the parameters of {rope_type} and {among} "
        f"{'among them' if inside else '(max_position_embeddings) to who does not look there'}: "
        "transformers 4 and 5 would read different models",
    )
    return beside
