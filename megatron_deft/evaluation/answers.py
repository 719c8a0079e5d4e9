r"""Answers of mathematics as texts: the gold of a test set's field, and what a model's output says.

Both sides are written alike before they are compared, since the comparison (math-verify) reads
LaTeX: no dollar signs or line ends within, and 4.5e33 as 4.5 \times 10^{33}.
"""

import re
from typing import Any, NamedTuple

from megatron_deft.data.prepare.boxed import boxed_answer

_BOX = re.compile(r"\\boxed(?![A-Za-z])")
_HASHED = re.compile(r"#### *(\S+)\s*\Z")
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?!\w|\.\d)")
# A formula within a text (of a length that cannot make the search slow), or a number outside.
_FORMULA_OR_NUMBER = re.compile(
    r"(?P<formula>\$\$.{0,999}?\$\$|\$[^$\n]{0,999}\$|\\\[.{0,999}?\\\]|\\\(.{0,999}?\\\))|"
    + _SCIENTIFIC.pattern,
    re.DOTALL,
)
_FENCE = re.compile(r"[(\[]|\\\{")  # where 1,200 may be two numbers
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,(?:\\! ?)?|\{,\}|\\[,!;: ]| )\d{3})+(?!\d|,\d)")
# What math-verify cannot read or takes for something else, and what it is to read. In a formula
# (most stand in golds of minerva_math): 1./3, the code np.arcsin; E_1 and the sun's sign, which are
# no symbols to it; \gamma + 1, which is the function of 1. The symbols put in are rarer ones.
_IN_FORMULAS = (
    (re.compile(r"(?<=\d)\.(?= ?[/*)}])"), ""),
    (re.compile(r"\bnp\.(?=[a-z])"), r"\\"),
    (re.compile(r"(?<![A-Za-z\\])[Ee](?=_)"), r"\\varpi"),
    (re.compile(r"_ ?(?:\{ ?\\odot ?\}|\\odot)"), "_{sun}"),
    (re.compile(r"\\gamma(?![A-Za-z])"), r"\\varsigma"),
)
# Around an answer: dollar signs, "about", spaces and a full stop, a font for a number; and at its
# end a term, or a factor c or t, which would be a unit.
_IN_ANSWERS = (
    (re.compile(r"\\?\$"), ""),
    (re.compile(r"\s+"), " "),
    (re.compile(r"^ ?(?:\\approx(?![A-Za-z])|\\simeq(?![A-Za-z])|≈|=) ?"), ""),
    (re.compile(r"(?:\\[,;:! ]|[ ~]|(?<!\\right)(?<![\\.])[.,;])+$"), ""),
    (re.compile(r"^ ?\\(?:text|math)[a-z]* ?\{ ?\(?([\d.,]+)\)? ?\}$"), r"\1"),
    (re.compile(r"(?:(?<=[\d}]) ?(?=[ct]$)|(?<=[-+*/=]) ?)([A-Za-z])$"), r"{\1}"),
    *_IN_FORMULAS,
)


class Reading(NamedTuple):
    """A text to compare with the gold: an answer, or (whole) an output that holds it somewhere."""

    text: str
    whole: bool


def plain_gold(value: Any) -> str | None:
    """An answer that is a text or a number; 27.0 is "27". None when there is none."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return (str(value).strip() if value == value else None) or None  # NaN differs from itself


def hashed_gold(value: Any) -> str | None:
    """What follows the last #### of a worked solution (GSM8K); a value without one is the gold."""
    if isinstance(value, str):
        return value.rpartition("####")[2].strip() or None
    return plain_gold(value)


def boxed_gold(value: Any) -> str | None:
    r"""What the last \boxed of a worked solution holds."""
    return boxed_answer(value) if isinstance(value, str) else None


def first_gold(value: Any) -> str | None:
    """The first of a list of answers (OlympiadBench), without its dollar signs."""
    first = plain_gold(value[0]) if isinstance(value, list) and value else None
    return first.strip("$").strip() or None if first else None


def readings(output: str) -> tuple[Reading, ...]:
    r"""What `output` may be read as, the likeliest first; none when it is empty.

    The last \boxed is the answer, or the last word after GSM8K's ####. Of several boxes the last
    ones may be the answer together ("\boxed{1} or \boxed{2}"), and without a box the answer is
    wherever it is found: both are left to math-verify. Rejected: math-verify alone, which always
    joins boxes that stand close.
    """
    hashed = _HASHED.search(output)
    last = boxed_answer(output) or (hashed[1] if hashed else None)
    found = [Reading(tidy(last), whole=False)] if last else []
    if output.strip() and (last is None or len(_BOX.findall(output)) > 1):
        for pattern, replacement in _IN_FORMULAS:
            output = pattern.sub(replacement, output)
        found.append(Reading(_FORMULA_OR_NUMBER.sub(_as_formula, output), whole=True))
    return tuple(found)


def tidy(answer: str) -> str:
    """`answer` as one line of LaTeX that can stand between dollar signs."""
    for pattern, replacement in _IN_ANSWERS:
        answer = pattern.sub(replacement, answer)
    if not _FENCE.search(answer):  # 12\,000 is 12 times 0 to math-verify
        answer = _THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), answer)
    return _powers_of_ten(answer.strip())


def _powers_of_ten(text: str) -> str:
    return _SCIENTIFIC.sub(lambda m: rf"{m[1]} \times 10^{{{int(m[2])}}}", text)


def _as_formula(match: re.Match[str]) -> str:
    formula = match["formula"]
    return f"${_powers_of_ten(match[0])}$" if formula is None else _powers_of_ten(formula)
