"""The objectives: pure functions from per-token statistics to loss, gate and kept tokens.

Every objective here has one differentiable input, `logp`, the log-probability of the target token,
so its gradient with respect to the logits is always `gate * (p_i - 1[i = y])` with
`gate = -dloss / dlogp`: "gate x error". An objective never sees logits and never communicates.
Adding one means adding one function and one row of `OBJECTIVES`.

The module is a leaf and needs no torch at import: it only calls methods of the tensors it is given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_deft.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TOPK_ENTROPY_SCALE = 3.0  # the constant of EAFT's released code, about ln 20


@dataclass(frozen=True)
class Statistics:
    """What the softmax over the real vocabulary says about each target token.

    All tensors share the labels' shape, fp32 unless noted; tokens whose label is ignored hold 0.

    logp:          log p_y, nats
    p:             p_y = exp(logp)
    collision:     Renyi-2 collision probability, sum_i p_i^2 = exp(-H2)
    entropy:       Shannon entropy, nats
    is_argmax:     bool, no logit is larger than the target's (token accuracy)
    valid:         bool, the label is not ignored
    topk_entropy:  entropy of the 20 largest probabilities renormalised to 1, nats; None unless
                   asked for
    mean_p:        scalar, mean of p over the valid tokens of the batch; None unless asked for
    vocab_size:    number of real vocabulary entries
    """

    logp: Tensor
    p: Tensor
    collision: Tensor
    entropy: Tensor
    is_argmax: Tensor
    valid: Tensor
    topk_entropy: Tensor | None
    mean_p: Tensor | None
    vocab_size: int


def _shortest(value: float | str) -> str:
    """A number without a trailing .0, still read back as the same number."""
    return str(value).removesuffix(".0")


class Gate(NamedTuple):
    """A gate in numbers, for the kernel that makes the gradient while it holds the row.

    gate = [low <= p <= high] * a / (a + eps) * p^a * (H / entropy_scale)^entropy_power, where a is
    `exponent` (exponent_of 0), the collision probability (1) or Cayley's function of p without a
    floor (2), and H the entropy of the `topk` largest probabilities, or of all for topk 0.
    csrc/gate.h evaluates it.
    """

    exponent_of: int = 0
    exponent: float = 0.0
    eps: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    entropy_power: float = 0.0
    entropy_scale: float = 1.0
    topk: int = 0


class Terms(NamedTuple):
    """Per-token loss and gate, fp32, and the tokens the objective keeps (None: all), bool."""

    loss: Tensor
    gate: Tensor
    keep: Tensor | None


def _weighted_nll(weight: Tensor, logp: Tensor) -> Tensor:
    """-weight * logp with 0 * inf = 0, the limit of every gate that vanishes with p; nan stays."""
    return (-weight * logp).masked_fill((weight == 0) & ~logp.isnan(), 0.0)


def _q_log(logp: Tensor, a: Tensor | float, eps: float = 0.0) -> Terms:
    """The loss -expm1(a * logp) / (a + eps) with gate a / (a + eps) * p^a; a = 0, eps = 0 is NLL.

    expm1 keeps full precision where p^a is close to 1, which is where q-log objectives meet NLL.
    """
    exponent = logp * a
    loss = -exponent.expm1() / (a + eps)
    gate = exponent.exp() * (a / (a + eps))
    if eps == 0.0 and not isinstance(a, float):
        loss, gate = loss.where(a != 0, -logp), gate.masked_fill(a == 0, 1.0)
    return Terms(loss, gate, None)


def _nll(s: Statistics) -> Terms:
    return Terms(-s.logp, s.p.new_ones(()).expand_as(s.p), None)


def _tsallis(s: Statistics, q: float) -> Terms:
    return _q_log(s.logp, q) if abs(q) > 1e-30 else _nll(s)  # the limit, where fp32 q is 0


def _dft(s: Statistics) -> Terms:
    return Terms(_weighted_nll(s.p, s.logp), s.p, None)


def _eaft(s: Statistics, power: float, entropy: str) -> Terms:
    if entropy == "topk20":
        assert s.topk_entropy is not None, "the caller must compute topk_entropy for eaft"
        relative = s.topk_entropy / TOPK_ENTROPY_SCALE
    else:
        relative = s.entropy / max(math.log(s.vocab_size), 1e-30)
    weight = relative.clamp(min=0.0) ** power
    return Terms(_weighted_nll(weight, s.logp), weight, None)


def _deft(s: Statistics, eps: float) -> Terms:
    return _q_log(s.logp, s.collision, eps)


def _cayley(s: Statistics, floor: str, eps: float) -> Terms:
    # r = 1 - p + 1e-8 and a_local = (1 - r) / (1 + r + 1e-8), written without the cancellation
    # that 1 - (1 - p) has in fp32.
    local = (s.p - 1e-8) / (2.0 + 2e-8 - s.p)
    if floor == "0":
        a = local
    else:
        assert s.mean_p is not None, "the caller must compute mean_p for cayley"
        lowest = 0.5 * s.mean_p
        a = lowest + (1.0 - lowest) * local
    return _q_log(s.logp, a.clamp(1e-3, 1.0), eps)


def _eaft_numbers(vocab_size: int, power: float, entropy: str) -> Gate:
    if entropy == "topk20":
        return Gate(entropy_power=power, entropy_scale=TOPK_ENTROPY_SCALE, topk=20)
    return Gate(entropy_power=power, entropy_scale=max(math.log(vocab_size), 1e-30))


def _threshold(s: Statistics, t: float, base: Callable[[Statistics], Terms], top: bool) -> Terms:
    loss, gate, _ = base(s)
    return Terms(loss, gate, ~(s.p < t) if top else ~(s.p > t))  # nan is kept, to be seen


@dataclass(frozen=True)
class Parameter:
    """One parameter of an objective: how it is read and what is legal."""

    legal: str
    accept: Callable[[Any], bool]
    default: float | str | None = None  # None: must be given
    text: bool = False


@dataclass(frozen=True)
class Family:
    """A row of the table: the function, its parameters, the other spellings, formula and source.

    numbers: the gate in numbers, or None where it depends on more than the token's own row
    """

    function: Callable[..., Terms]
    formula: str
    gate: str
    source: str
    aliases: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    numbers: Callable[..., Gate | None] = lambda *_: None  # of vocab_size and the parameters


@dataclass(frozen=True)
class Objective:
    """A parsed objective: `name` and `values` identify it, `spec` is its canonical spelling.

    topk:       k of the top-k entropy it needs, 0 if none
    batch_mean: "micro_batch" or "data_parallel" when it needs the mean of p over that batch
    """

    name: str
    values: tuple[tuple[str, float | str], ...] = ()

    @property
    def spec(self) -> str:
        """Canonical spelling; `parse(objective.spec) == objective`."""
        inner = ", ".join(f"{key}={_shortest(value)}" for key, value in self.values)
        return f"{self.name}({inner})" if inner else self.name

    @property
    def topk(self) -> int:
        """How many largest probabilities the objective looks at (EAFT), 0 for none."""
        return 20 if dict(self.values).get("entropy") == "topk20" else 0

    @property
    def batch_mean(self) -> str | None:
        """Over which batch the objective needs the mean of p (Cayley), or None."""
        floor = dict(self.values).get("floor", "0")
        return None if floor == "0" else str(floor)

    def gate(self, vocab_size: int) -> Gate | None:
        """The gate in numbers; None where it needs a mean over the batch."""
        return OBJECTIVES[self.name].numbers(vocab_size, **dict(self.values))

    def __call__(self, statistics: Statistics) -> tuple[Tensor, Tensor, Tensor]:
        """Per-token loss and gate (both 0 outside kept tokens) and the kept tokens."""
        loss, gate, keep = OBJECTIVES[self.name].function(statistics, **dict(self.values))
        keep = statistics.valid if keep is None else keep & statistics.valid
        return loss.masked_fill(~keep, 0.0), gate.masked_fill(~keep, 0.0), keep


_FINITE = Parameter("any finite number", math.isfinite)
_POSITIVE = Parameter("a finite number > 0", lambda v: math.isfinite(v) and v > 0, 1.0)
_TOP = Parameter("0 <= t < 1", lambda v: 0 <= v < 1)
_BOTTOM = Parameter("0 < t <= 1", lambda v: 0 < v <= 1)


def _eps(default: float) -> Parameter:
    return Parameter("a finite number >= 0", lambda v: math.isfinite(v) and v >= 0, default)


def _choice(*names: str) -> Parameter:
    return Parameter(" or ".join(names), lambda v: v in names, names[0], text=True)


OBJECTIVES: dict[str, Family] = {
    "nll": Family(_nll, "-l", "1", "cross-entropy", ("original", "logp", "sft"),
        numbers=lambda _: Gate()),
    "p": Family(partial(_tsallis, q=1.0), "1 - p", "p", "arXiv 2510.00526",
        numbers=lambda _: Gate(exponent=1.0)),
    "tsallis": Family(
        _tsallis, "(1 - p^q)/q", "p^q", "arXiv 2510.00526, 2602.11424",
        ("generalfamily",), {"q": _FINITE}, lambda _, q: Gate(exponent=q)),
    "onlytopp": Family(
        partial(_threshold, base=partial(_tsallis, q=1.0), top=True), "1 - p where p >= t", "p",
        "arXiv 2510.00526 code", (), {"t": _TOP}, lambda _, t: Gate(exponent=1.0, low=t)),
    "onlybottomp": Family(
        partial(_threshold, base=partial(_tsallis, q=1.0), top=False), "1 - p where p <= t", "p",
        "arXiv 2510.00526 code", (), {"t": _BOTTOM}, lambda _, t: Gate(exponent=1.0, high=t)),
    "onlytoplogp": Family(
        partial(_threshold, base=_nll, top=True), "-l where p >= t", "1",
        "arXiv 2510.00526 code", (), {"t": _TOP}, lambda _, t: Gate(low=t)),
    "onlybottomlogp": Family(
        partial(_threshold, base=_nll, top=False), "-l where p <= t", "1",
        "arXiv 2510.00526 code", (), {"t": _BOTTOM}, lambda _, t: Gate(high=t)),
    "dft": Family(_dft, "-sg(p) * l", "p", "arXiv 2508.05629",
        numbers=lambda _: Gate(exponent=1.0)),
    "eaft": Family(
        _eaft, "-sg(w) * l, w = (H_top20/3)^power or (H/ln V)^power", "w", "arXiv 2601.02151",
        (), {"power": _POSITIVE, "entropy": _choice("topk20", "exact")}, _eaft_numbers),
    "cayley": Family(
        _cayley, "-expm1(a*l)/(a + eps), a = clamp(f + (1-f)*p/(2-p)), f = mean(p)/2",
        "a/(a + eps) * p^a", "arXiv 2602.11424", ("cayley_trans",),
        {"floor": _choice("micro_batch", "data_parallel", "0"), "eps": _eps(1e-8)},
        lambda _, floor, eps: Gate(exponent_of=2, eps=eps) if floor == "0" else None),
    "deft": Family(
        _deft, "-expm1(a*l)/(a + eps), a = sg(sum p_i^2)", "a/(a + eps) * p^a",
        "arXiv 2602.11424", (), {"eps": _eps(1e-6)}, lambda _, eps: Gate(exponent_of=1, eps=eps)),
}  # fmt: skip
"""Every objective, `l` = log p. `deft`'s default eps is the released code's; with a near-uniform
152k vocabulary (a = 6.6e-6) it costs 13% of the gate: `deft(eps=0)` is the paper's formula."""

_NAMES = {alias: name for name, row in OBJECTIVES.items() for alias in (name, *row.aliases)}
_SHAPE = re.compile(r"\s*([a-z_]+)\s*(?:\((.*)\)|-(.+))?\s*", re.DOTALL)


def parse(spec: str | Objective) -> Objective:
    """Read `name`, `name(key=value, ...)`, `name(value)` or the released `Name-value`.

    Case does not matter. Errors: UserError listing the legal names, keys or values.
    """
    if isinstance(spec, Objective):
        return spec
    if not isinstance(spec, str):
        raise UserError(f"objective must be a string such as 'deft', got {spec!r}")
    match = _SHAPE.fullmatch(spec.lower())
    name = _NAMES.get(match[1]) if match else None
    if match is None or name is None:
        raise UserError(
            f"unknown objective {spec!r}: legal are {', '.join(sorted(_NAMES))}, "
            "written name, name(key=value, ...) or Name-value"
        )
    parameters = OBJECTIVES[name].parameters
    given: dict[str, str] = {}
    for part in (match[2] or match[3] or "").split(","):
        if not part.strip():
            continue
        key, equals, value = (text.strip() for text in part.partition("="))
        if not equals:  # a bare value belongs to the first parameter
            key, value = next(iter(parameters), ""), key
        if key not in parameters or key in given:
            what = "given twice" if key in given else "unknown"
            legal = ", ".join(parameters) or "no parameter at all"
            raise UserError(
                f"objective {spec!r}: parameter {key or value!r} is {what}; {name} takes {legal}"
            )
        given[key] = value
    values = tuple((key, _value(spec, key, row, given.get(key))) for key, row in parameters.items())
    return Objective(name, values)


def _value(spec: str, key: str, parameter: Parameter, text: str | None) -> float | str:
    """One parameter's value, checked."""
    if text is None:
        if parameter.default is None:
            raise UserError(f"objective {spec!r} needs {key}: {parameter.legal}")
        return parameter.default
    try:
        value = text if parameter.text else float(text)
    except ValueError:
        value = math.nan
    if not parameter.accept(value):
        raise UserError(
            f"objective {spec!r}: {key}={text} is not legal, it must be {parameter.legal}"
        )
    return value


def describe() -> str:
    """A table of every objective: spelling, loss, gate, parameters, source (for the terminal)."""
    rows = [("objective", "loss (l = log p)", "gate", "parameters", "source")]
    for name, row in OBJECTIVES.items():
        parameters = "; ".join(
            f"{key}: {p.legal}" + ("" if p.default is None else f" [{p.default}]")
            for key, p in row.parameters.items()
        )
        names = " = ".join((name, *row.aliases))
        rows.append((names, row.formula, row.gate, parameters or "-", row.source))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
