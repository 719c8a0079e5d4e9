"""Loss and both gradients of every contender of `bench head` against float64, before it is timed.

What is allowed is twice the error that the plain formula makes in the head's own dtype: logits in
it, an exact softmax of them, their gradient rounded to it, two products.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_deft.benchmarks.check import Softmax, WrongResultError
from megatron_deft.benchmarks.head_contenders import HeadOutcome, Rounding
from megatron_deft.benchmarks.peers import IGNORE

BLOCK = 1 << 24  # logits made in float64 at a time
FACTOR = 2.0  # times the plain formula's error
LEAST = 2e-4  # allowed in any case, relative: what torch's own fp32 softmax needs


class HeadReference:
    """hidden [N, H], weight [V, H] of one dtype; labels [N], some of them ignored."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, topk: int = 0) -> None:
        self.hidden, self.weight, self.labels = hidden, weight.detach(), labels
        self.topk = topk
        self._expected: dict[str, HeadOutcome] = {}
        self._allowed: dict[tuple[str, Rounding], tuple[float, ...]] = {}

    def verify(self, outcome: HeadOutcome, objective: str, rounding: Rounding) -> None:
        """Errors: WrongResultError saying what is off, by how much."""
        allowed = self.allowed(objective, rounding)
        errors = relative_errors(outcome, self.expected(objective))
        names = ("loss", "gradient of hidden", "gradient of weight")
        for name, error, limit in zip(names, errors, allowed, strict=True):
            if not error <= limit:  # nan is wrong too
                raise WrongResultError(
                    f"{name}: relative error {error:.1e} against float64, {limit:.1e} allowed"
                )

    def expected(self, objective: str) -> HeadOutcome:
        """float64."""
        if objective not in self._expected:
            hidden = self.hidden.double()
            self._expected[objective] = _formula(
                hidden, self._weight64, self._statistics64, objective, self.labels, Rounding()
            )
        return self._expected[objective]

    def allowed(self, objective: str, rounding: Rounding) -> tuple[float, ...]:
        """Relative errors of the three, see `relative_errors`."""
        key = objective, rounding
        if key not in self._allowed:
            plain = _formula(
                self.hidden, self.weight, self._statistics, objective, self.labels, rounding
            )
            errors = relative_errors(plain, self.expected(objective))
            self._allowed[key] = tuple(max(LEAST, FACTOR * error) for error in errors)
        return self._allowed[key]

    @cached_property
    def _weight64(self) -> Tensor:
        return self.weight.double()

    @cached_property
    def _statistics64(self) -> Softmax:
        return self._reduce(self.hidden.double(), self._weight64)

    @cached_property
    def _statistics(self) -> Softmax:
        return self._reduce(self.hidden, self.weight)

    def _reduce(self, hidden: Tensor, weight: Tensor) -> Softmax:
        """What the objectives look at, of logits in the dtype of the head."""
        labels = self.labels.clamp(min=0)
        rows = _rows(weight)
        blocks = (
            (F.linear(hidden[i : i + rows], weight), labels[i : i + rows])
            for i in range(0, len(labels), rows)
        )
        return Softmax(blocks, weight.shape[0], self.topk)


def _rows(weight: Tensor) -> int:
    return max(1, BLOCK // weight.shape[0])


def _formula(
    hidden: Tensor,
    weight: Tensor,
    statistics: Softmax,
    objective: str,
    labels: Tensor,
    rounding: Rounding,
) -> HeadOutcome:
    """Loss and gradients by the plain formula, in the dtype of hidden and weight."""
    dtype = weight.dtype
    loss, gate = statistics.loss_and_gate(objective, labels)
    grad_hidden = torch.empty_like(hidden)
    # in float64, so that what is rounded is the products' sum and not those of this loop
    sums = torch.zeros_like(weight, dtype=dtype if rounding.chunk else torch.float64)
    rows = rounding.chunk or _rows(weight)
    for i in range(0, len(labels), rows):
        part = slice(i, i + rows)
        grad = F.linear(hidden[part], weight).double().softmax(-1)
        target = labels[part, None].clamp(min=0)
        grad.scatter_add_(1, target, -torch.ones_like(grad[:, :1]))
        grad.mul_(gate[part, None])
        grad = grad.to(rounding.logits_grad or dtype).to(dtype)
        grad_hidden[part] = grad @ weight
        if rounding.chunk:
            sums += grad.t() @ hidden[part]
        else:
            exact = torch.float64 if dtype == torch.float64 else torch.float32
            sums += grad.t().to(exact) @ hidden[part].to(exact)
    return HeadOutcome(loss.masked_fill(labels == IGNORE, 0.0), grad_hidden, sums.to(dtype))


def relative_errors(outcome: HeadOutcome, expected: HeadOutcome) -> tuple[float, float, float]:
    """Of loss, gradient of hidden, gradient of weight: the worst token's or row's.

    A row's error is relative to its length and the rows' mean length, a loss's to itself and 1.
    """
    want = expected.loss
    if outcome.loss.dim():
        loss = ((outcome.loss.double() - want).abs() / (want.abs() + 1.0)).max()
    else:
        loss = (outcome.loss.double() - want.sum()).abs() / (want.abs() + 1.0).sum()
    rows = [
        _row_error(outcome.grad_hidden, expected.grad_hidden),
        _row_error(outcome.grad_weight, expected.grad_weight),
    ]
    return loss.item(), rows[0], rows[1]


def _row_error(got: Tensor, want: Tensor) -> float:
    length = want.norm(dim=1)
    error = (got.double() - want).norm(dim=1)
    return (error / (length + length.mean()).clamp(min=torch.finfo(want.dtype).tiny)).max().item()
