"""One configuration value: its declaration, its legal range, and the check against its type."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable
from dataclasses import MISSING, Field, field
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from megatron_deft.errors import UserError


class Legal(NamedTuple):
    """A range: its words (in errors and in the help) and the predicate."""

    words: str
    accepts: Callable[[Any], bool]


AT_LEAST_0 = Legal(">= 0", lambda value: value >= 0)
AT_LEAST_1 = Legal(">= 1", lambda value: value >= 1)
ABOVE_0 = Legal("> 0", lambda value: value > 0)
FRACTION = Legal("in [0, 1]", lambda value: 0 <= value <= 1)
BELOW_1 = Legal("in [0, 1)", lambda value: 0 <= value < 1)
NOT_EMPTY = Legal("non-empty", bool)
# Pipeline stages and tensor ranks add to it, and torch takes less than 2^64.
SEED = Legal(">= 0 and < 2^63", lambda value: 0 <= value < 2**63)
ABOVE_0_EACH = Legal("> 0", lambda value: value == () or value > 0)
LONGEST = 1000 * 86400  # seconds of a duration: far beyond any job, within what timers can count
DURATION = Legal(
    "minutes above 0, or such as 90s, 45m, 3h50m, 1d12h; at most 1000d",
    lambda v: 0 < seconds(v) <= LONGEST,
)
RECOMPUTED = ("core_attn", "layernorm", "mlp", "moe")
MODULES = Legal(f"among {', '.join(RECOMPUTED)}", lambda value: value == () or value in RECOMPUTED)
NAMES = Legal("non-empty names", lambda value: value == () or bool(value))


def key(meaning: str, default: Any = MISSING, legal: Legal | None = None) -> Any:
    """Declare a configuration key; without a default it is required."""
    return field(default=default, metadata={"meaning": meaning, "legal": legal})


_UNITS = (86400, 3600, 60, 1)  # seconds


def seconds(duration: float | str) -> float:
    """Minutes, or text such as 3h50m, as seconds; 0 for any other text."""
    if isinstance(duration, int | float):
        return 60.0 * duration
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", duration)
    numbers = found.groups() if found else ()
    parts = zip(numbers, _UNITS, strict=False)
    return sum((float(n or 0) * size for n, size in parts), 0.0)  # int() takes no 5000 digits


def type_words(hint: Any) -> str:
    """A type in a user's words: `int or null`, `one of fp32, bf16`, `list of strings`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        words = [_spell(value) for value in arguments]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(argument) for argument in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"list of {len(arguments)} {_WORDS[arguments[0]]}s"
    if origin is tuple:
        return f"list of {_WORDS[arguments[0]]}s"
    return _WORDS[hint]


_WORDS: dict[Any, str] = {
    str: "string",
    int: "integer",
    float: "finite number",
    bool: "true or false",
    type(None): "null",
}


def _spell(value: Any) -> str:
    """A value as YAML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


class _WrongTypeError(Exception):
    pass


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, exactly: no string is read as a number, no number as a string."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if any(value == legal and type(value) is type(legal) for legal in arguments):
            return value
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            try:
                return _convert(value, argument)
            except _WrongTypeError:
                continue
    elif origin is tuple:
        variadic = arguments[-1] is Ellipsis
        # As in the released trainers: one name is a list of one, null an empty list.
        items = [value] if isinstance(value, str) else [] if value is None else value
        if isinstance(items, list | tuple) and (variadic or len(items) == len(arguments)):
            return tuple(_convert(item, arguments[0]) for item in items)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif type(value) is hint or (hint is type(None) and value is None):
        return value
    raise _WrongTypeError


def checked(name: str, declaration: Field[Any], hint: Any, value: Any) -> Any:
    """`value` as the key's type. Errors: UserError naming key, value and what is legal."""
    legal = declaration.metadata["legal"]
    try:
        converted = _convert(value, hint)
    except _WrongTypeError:
        expected = type_words(hint) + (f", {legal.words}" if legal else "")
        quote = (
            f" (write it in quotes: '{_spell(value)}')" if _only_quotes_missing(value, hint) else ""
        )
        raise UserError(f"{name}={_spell(value)}: expected {expected}{quote}") from None
    if legal is not None and converted is not None:
        parts = converted if isinstance(converted, tuple) and converted else (converted,)
        if not all(legal.accepts(part) for part in parts):
            shown = list(converted) if isinstance(converted, tuple) else _spell(converted)
            raise UserError(f"{name}={shown}: must be {legal.words}")
    return converted


def _only_quotes_missing(value: Any, hint: Any) -> bool:
    """Whether YAML read a number or truth value where a string was meant (`experiment: 7`).

    Not where a number would do, too (`exit_duration: 1e400`): then this one is none of those.
    """
    wants_text = hint is str or (str in get_args(hint) and float not in get_args(hint))
    return wants_text and isinstance(value, int | float) and get_origin(hint) is not Literal
