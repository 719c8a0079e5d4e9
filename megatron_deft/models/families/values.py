"""Single values of a config.json. What is not of the type that its key wants is an error that names
the key: a config may come from anywhere, and a guess would train another model."""

from collections.abc import Callable
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.models.families.table import Config

LARGEST = 2**40  # no size and no number of a real config is near it; 1e400 is read as infinity
MOST_LAYERS = 10_000
SHOWN = 80  # characters of a wrong value


def require(condition: bool, message: str) -> None:
    """Raise UserError about the config unless `condition`."""
    if not condition:
        raise UserError(f"config.json: {message}")


def shown(value: Any) -> str:
    """A value for an error message: on one line, cut when it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _require(fits: bool, key: str, legal: str, value: Any) -> None:
    require(fits, f"{key} must be {legal}, got {shown(value)}")


def whole(config: Config, key: str, least: int = 1, most: int = LARGEST) -> int:
    """An integer from `least` to `most`."""
    value = config.get(key)
    fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    legal = "a positive integer" if least == 1 else f"an integer of at least {least}"
    _require(fits, key, legal + f", at most {most}" * (most < LARGEST), value)
    return int(config[key])


def real(config: Config, key: str, zero: bool = False, most: float = LARGEST) -> float:
    """A positive number, or 0 with `zero`, of at most `most`; not infinite, not nan."""
    value = config.get(key)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
    legal = "a number of at least 0" if zero else "a positive number"
    _require(
        fits and (zero or value != 0), key, legal + f", at most {most:g}" * (most < LARGEST), value
    )
    return float(config[key])


def boolean(config: Config, key: str) -> bool:
    """true or false."""
    value = config.get(key)
    _require(isinstance(value, bool), key, "true or false", value)
    return bool(value)


def table(config: Config, key: str) -> dict[str, Any]:
    """An object; empty where the key is null or absent."""
    value = config.get(key)
    _require(value is None or isinstance(value, dict), key, "an object", value)
    return dict(value or {})


def items(config: Config, key: str, kind: type) -> list[Any]:
    """A list of strings or of integers, by `kind`; empty where the key is null or absent."""
    value = config.get(key)
    fits = value is None or (isinstance(value, list) and all(type(v) is kind for v in value))
    _require(fits, key, f"a list of {'strings' if kind is str else 'integers'}", value)
    return list(value or ())


def positive(key: str) -> Callable[[Config], int]:
    """Reads a positive integer."""
    return lambda config: whole(config, key)


def switch(key: str) -> Callable[[Config], bool]:
    """Reads a boolean."""
    return lambda config: boolean(config, key)


def optional(key: str, read: Callable[[Config, str], Any]) -> Callable[[Config], Any]:
    """Reads the value with `read`, None where it is null."""
    return lambda config: None if config.get(key) is None else read(config, key)


def layers(config: Config) -> int:
    """The number of layers."""
    return whole(config, "num_hidden_layers", most=MOST_LAYERS)
