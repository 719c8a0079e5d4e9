"""Loss and gradients of every contender of `bench head` against float64, before it is timed.

What is allowed is twice the error that the plain formula makes in the head's own dtype: logits in
it, an exact softmax of them, their gradient rounded to it, two products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_deft.benchmarks.check import Softmax, WrongResultError
from megatron_deft.benchmarks.head_contenders import HeadOutcome, Rounding
from megatron_deft.benchmarks.peers import IGNORE

BLOCK = 1 << 24  # logits made at a time
TOKENS, ENTRIES = 64, 2048  # whose gradients are compared: of the hidden states, of the weight
FACTOR = 2.0  # times the plain formula's error
LEAST = 2e-4  # allowed in any case, relative: what torch's own fp32 softmax needs


class Slice(NamedTuple):
    """The rows of the gradients that are compared, from one end to the other."""

    tokens: Tensor
    entries: Tensor


class HeadReference:
    """What objectives make of hidden [N, H] and weight [V, H] of one dtype.

    labels: [N], none of them ignored; `verify` takes the same with some of them ignored
    topk:   of the top-k entropy, 0 when no objective needs it
    """

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, topk: int = 0) -> None:
        weight = weight.detach()
        exact = weight.double()
        self.plain = _Formula(hidden, weight, _softmax(hidden, weight, labels, topk))
        hidden = hidden.double()
        self.exact = _Formula(hidden, exact, _softmax(hidden, exact, labels, topk))
        # every other one is an entry that is a label
        others = _spread(weight.shape[0], ENTRIES // 2).to(labels.device)
        named = labels[_spread(len(labels), ENTRIES // 2).to(labels.device)]
        tokens = _spread(len(labels), TOKENS).to(labels.device)
        self.slice = Slice(tokens, torch.cat([others, named]).unique())

    def verify(
        self, outcome: HeadOutcome, objective: str, labels: Tensor, rounding: Rounding
    ) -> None:
        """Errors: WrongResultError saying what is off, by how much."""
        tokens, entries = self.slice
        outcome = HeadOutcome(
            outcome.loss, outcome.grad_hidden[tokens], outcome.grad_weight[entries]
        )
        want = self.exact(objective, labels, Rounding(), self.slice)
        plain = relative_errors(self.plain(objective, labels, rounding, self.slice), want)
        names = ("loss", "gradient of hidden", "gradient of weight")
        for name, error, of_plain in zip(names, relative_errors(outcome, want), plain, strict=True):
            limit = max(LEAST, FACTOR * of_plain)
            if not error <= limit:  # nan is wrong too
                raise WrongResultError(
                    f"{name}: relative error {error:.1e} against float64, {limit:.1e} allowed"
                )


def _spread(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, most)).long()


def _softmax(hidden: Tensor, weight: Tensor, labels: Tensor, topk: int) -> Softmax:
    rows = max(1, BLOCK // weight.shape[0])
    blocks = (
        (F.linear(hidden[i : i + rows], weight), labels[i : i + rows])
        for i in range(0, len(labels), rows)
    )
    return Softmax(blocks, weight.shape[0], topk)


class _Formula(NamedTuple):
    """Loss and gradients as they are written down, in the dtype of hidden and weight."""

    hidden: Tensor
    weight: Tensor
    softmax: Softmax

    def __call__(
        self, objective: str, labels: Tensor, rounding: Rounding, of: Slice
    ) -> HeadOutcome:
        """Loss of all tokens, gradients of a slice."""
        dtype = self.weight.dtype
        loss, gate = self.softmax.loss_and_gate(objective, labels)
        every = torch.arange(self.weight.shape[0], device=labels.device)

        def of_logits(tokens: Tensor, entries: Tensor) -> Tensor:
            logits = F.linear(self.hidden[tokens], self.weight[entries]).double()
            grad = (logits - self.softmax.logsumexp[tokens, None]).exp_()
            grad -= (labels[tokens, None] == entries).double()
            grad *= gate[tokens, None]
            return grad.to(rounding.logits_grad or dtype).to(dtype)

        grad_hidden = of_logits(of.tokens, every) @ self.weight
        return HeadOutcome(
            loss.masked_fill(labels == IGNORE, 0.0),
            grad_hidden,
            self._of_weight(of_logits, of.entries, rounding.chunk),
        )

    def _of_weight(
        self, of_logits: Callable[[Tensor, Tensor], Tensor], entries: Tensor, chunk: int | None
    ) -> Tensor:
        """The products of all tokens; `chunk`: of so many at a time, summed in the dtype."""
        tokens = torch.arange(len(self.hidden), device=entries.device)
        sums = torch.zeros_like(self.weight[entries])
        for part in tokens.split(chunk or len(tokens)):
            sums += of_logits(part, entries).t() @ self.hidden[part]
        return sums


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
