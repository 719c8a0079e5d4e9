"""Every contender's loss and gradient against the formula in float64, before it is timed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_deft.benchmarks.contenders import Outcome
from megatron_deft.benchmarks.peers import IGNORE
from megatron_deft.objectives import Statistics, parse

CHUNK = 1 << 22  # logits converted to float64 at a time
SLICE = 8  # rows whose gradient is compared
P_RESOLUTION = 4e-6  # of fp32 probabilities, from logits of a few tens
GATE_RESOLUTION = 2e-7  # of a gate that torch finds as 1 + expm1


class WrongResultError(Exception):
    """A contender computed something else than its objective: it is not timed."""


@dataclass(frozen=True)
class Expected:
    """What a contender has to compute, float64.

    loss:       [N] of every token
    grad:       [k, V] of the rows `rows` [k]
    targets:    [k, 1] labels of those rows
    resolution: [k] length below which fp32 arithmetic cannot tell the gradient of a row
    """

    loss: Tensor
    rows: Tensor
    grad: Tensor
    targets: Tensor
    resolution: Tensor


class Softmax:
    """The softmax of N rows of logits in float64, reduced to what the objectives look at."""

    def __init__(
        self, blocks: Iterable[tuple[Tensor, Tensor]], vocabulary: int, topk: int = 0
    ) -> None:
        """blocks: some rows each, logits [n, vocabulary] and labels [n], none of them ignored."""
        parts = [_reduce(logits, labels, topk) for logits, labels in blocks]
        columns = (torch.cat(column) for column in zip(*parts, strict=True))
        self.logp, self.collision, self.entropy, self.is_argmax, *others = columns
        self.top_entropy, self.logsumexp = others
        self.vocabulary = vocabulary

    def loss_and_gate(self, objective: str, labels: Tensor) -> tuple[Tensor, Tensor]:
        """[N] each, float64, of labels of which some may be ignored."""
        valid = labels != IGNORE
        p = self.logp.exp()
        loss, gate, _ = parse(objective)(
            Statistics(
                logp=self.logp,
                p=p,
                collision=self.collision,
                entropy=self.entropy,
                is_argmax=self.is_argmax,
                valid=valid,
                topk_entropy=self.top_entropy,
                mean_p=p[valid].sum() / valid.sum().clamp(min=1),
                vocab_size=self.vocabulary,
            )
        )
        return loss, gate


class Reference:
    """What objectives make of logits [N, V].

    labels: [N], none of them ignored; `expected` takes the same with some of them ignored
    topk:   of the top-k entropy, 0 when no objective needs it
    """

    def __init__(self, logits: Tensor, labels: Tensor, topk: int = 0) -> None:
        step = max(1, CHUNK // logits.shape[1])
        blocks = ((logits[i : i + step], labels[i : i + step]) for i in range(0, len(labels), step))
        self.softmax = Softmax(blocks, logits.shape[1], topk)
        self.rows = torch.linspace(0, len(labels) - 1, min(SLICE, len(labels))).long()
        self.rows = self.rows.to(logits.device)
        self.error = logits[self.rows].double().softmax(-1)  # p_i - 1[i = y]
        self.targets = labels[self.rows, None]
        self.error.scatter_add_(1, self.targets, -torch.ones_like(self.error[:, :1]))

    def expected(self, objective: str, labels: Tensor) -> Expected:
        """What `objective` makes of these logits and labels (some ignored)."""
        loss, gate = self.softmax.loss_and_gate(objective, labels)
        gate = gate[self.rows]
        resolution = P_RESOLUTION * gate.abs() + GATE_RESOLUTION
        return Expected(loss, self.rows, gate[:, None] * self.error, self.targets, resolution)


def _reduce(logits: Tensor, labels: Tensor, topk: int) -> tuple[Tensor, ...]:
    """Of some rows: log p_y, collision, entropy, is_argmax, top-k entropy, log sum exp."""
    logits = logits.double()
    log_probs = logits.log_softmax(-1)
    target = log_probs.gather(1, labels[:, None])[:, 0]
    logsumexp = logits.gather(1, labels[:, None])[:, 0] - target
    top = log_probs.topk(min(topk, logits.shape[1]), dim=-1).values.log_softmax(-1)
    is_argmax = target >= log_probs.amax(-1)
    probs = log_probs.exp()
    entropy = -log_probs.mul_(probs).sum(-1)
    return (
        target,
        probs.square_().sum(-1),
        entropy,
        is_argmax,
        -(top.exp() * top).sum(-1),
        logsumexp,
    )


def tolerance(*dtypes: torch.dtype) -> float:
    """Relative: half as much again as one rounding to the coarsest of the dtypes.

    At least what torch's own fp32 softmax over 150,000 columns needs, whose sums are off by 4e-5.
    """
    return max(2e-4, *(0.75 * torch.finfo(dtype).eps for dtype in dtypes))


def verify(outcome: Outcome, expected: Expected, rounds_to: torch.dtype | None) -> None:
    """Errors: WrongResultError saying which of loss and gradient is off, by how much."""
    if outcome.loss is not None:
        want = expected.loss if outcome.loss.dim() else expected.loss.sum()
        error = (outcome.loss.double() - want).abs() / (want.abs() + 1.0)
        _refuse("loss", error, tolerance(outcome.loss.dtype))
    if outcome.grad is not None:
        got = outcome.grad[expected.rows].double()
        kind = torch.finfo(outcome.grad.dtype)
        smallest = kind.smallest_normal * kind.eps * got.shape[1] ** 0.5
        allowed = tolerance(outcome.grad.dtype, rounds_to or outcome.grad.dtype)
        # The target's entry apart: most of the length may lie in it, or next to nothing.
        at_target = torch.zeros_like(got, dtype=torch.bool).scatter_(1, expected.targets, True)
        for name, part in (("at the target", at_target), ("elsewhere", ~at_target)):
            want = expected.grad.where(part, 0.0)
            error = (got.where(part, 0.0) - want).norm(dim=-1) - expected.resolution
            error = error.clamp(min=0) / (want.norm(dim=-1) + smallest)
            _refuse(f"gradient {name}", error, allowed)


def _refuse(what: str, error: Tensor, allowed: float) -> None:
    worst = error.max().item()
    if not worst <= allowed:  # nan is wrong too
        raise WrongResultError(
            f"{what}: relative error {worst:.1e} against float64, {allowed:.1e} allowed"
        )
