"""math-verify in processes, since it can run for ever: is an answer equal to the gold?

Its own limit is an alarm, which needs a process's main thread and cannot stop a power of whole
numbers that fills the memory; it is off here. Nothing heavy is imported at the top: each process
imports this module.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tqdm import tqdm

from megatron_deft.errors import UserError
from megatron_deft.evaluation.answers import Reading
from megatron_deft.evaluation.limited import Calls, Limits, Stopped, run_limited

_ANTLR, _ANTLR_VERSION = "antlr4-python3-runtime", "4.13.2"
_DECIMALS = 1e-5  # a difference that six decimals show
_DIGITS = 1e-3  # the part of a number that tells it from another one
_NOISE = 1e-12  # the part of a number that its binary fraction may be off by

Answer = tuple[str, tuple[Reading, ...]]  # the gold, tidied, and the readings of an output


def check_installed() -> None:
    """Errors: UserError when math-verify is not there, or with a parser that flips verdicts."""
    try:
        import math_verify  # noqa: F401

        found = version(_ANTLR)
    except (ImportError, PackageNotFoundError) as error:
        raise UserError(
            f"mathematics is scored with math-verify ({error}): pip install 'megatron-deft[math]'"
        ) from error
    if found != _ANTLR_VERSION:
        raise UserError(
            f"{_ANTLR} {found} is installed, and only with {_ANTLR_VERSION} are math-verify's "
            f"verdicts right: pip install {_ANTLR}=={_ANTLR_VERSION}, in an environment without "
            "what holds it back (hydra-core, omegaconf)"
        )


def verify(
    answers: Sequence[Answer],
    workers: int,
    limits: Limits = Limits(),  # noqa: B008 - it is frozen
) -> list[bool | Stopped]:
    """Whether each of `answers` is right, or that it could not be told within the limits.

    Errors: UserError as check_installed and run_limited.
    """
    check_installed()
    calls = Calls(_right, _start, limits)
    found = run_limited(calls, answers, workers)
    verdicts = dict(
        tqdm(found, total=len(answers), desc="math-verify", unit=" answers", disable=None)
    )
    return [verdicts[index] for index in range(len(answers))]


def _start() -> None:
    """Make a process ready; the first comparison builds the parser, which takes long."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarms are off
    equal("1", Reading(r"\frac{1}{2}", whole=False))


def _right(gold: str, found: Sequence[Reading]) -> bool:
    return any(equal(gold, reading) for reading in found)


def equal(gold: str, reading: Reading) -> bool:
    """Whether math-verify finds a reading equal to the gold; it may take for ever.

    Of numbers it compares six decimals, so that 2e-9 were 3e-9, and binary fractions to the last
    bit, so that 6.02e23 were not 602e21: those are compared by their size.
    """
    from math_verify import verify as compare

    if gold == reading.text:
        return True
    ours, theirs = _parse(gold), _search(reading.text) if reading.whole else _parse(reading.text)
    # Both are an expression and its text; texts first, since equal ones need no algebra.
    same = bool(compare(ours[::-1], theirs[::-1], timeout_seconds=None))
    return _compare_sizes(ours[0], theirs[0], same) if ours and theirs else same


def _compare_sizes(gold: Any, prediction: Any, same: bool) -> bool:
    """`same`, but for two numbers that differ by no more or no less than rounding explains."""
    from sympy import Eq, Expr, Float

    one, other = (side.rhs if isinstance(side, Eq) else side for side in (gold, prediction))
    numbers = all(isinstance(side, Expr) and side.is_number for side in (one, other))
    if not numbers or one == other:
        return same
    difference, size = abs((one - other).evalf()), abs(one.evalf())
    if not (difference.is_comparable and size.is_comparable):  # infinite, or no number after all
        return same
    if same:
        return bool(difference <= size * _DIGITS or difference > _DECIMALS)
    return bool(difference <= size * _NOISE) and (one.has(Float) or other.has(Float))


@lru_cache(maxsize=256)
def _parse(answer: str) -> list[Any]:
    """An answer as an expression and as a text; the text alone when it is not mathematics."""
    from math_verify import LatexExtractionConfig, parse

    return parse(
        f"${answer}$",
        [LatexExtractionConfig()],
        extraction_mode="first_match",
        parsing_timeout=None,
    )


def _search(output: str) -> list[Any]:
    """The answer that math-verify finds in a text; of boxes the last ones."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    boxes = LatexExtractionConfig(boxed_match_priority=0)
    return parse(output, [boxes, ExprExtractionConfig()], parsing_timeout=None)
