"""What `bench head` compares: ways from hidden states and head to the gradients of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_deft.benchmarks import peers
from megatron_deft.benchmarks.peers import IGNORE
from megatron_deft.loss.fused_linear import fused_linear_loss
from megatron_deft.loss.vocab_parallel import token_loss
from megatron_deft.objectives import parse

MAIN_GRAD, GRAD = "main_grad", "weight.grad"
LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, labels -> [N] or their sum


class HeadOutcome(NamedTuple):
    """What a contender computed.

    loss:        [N] of every token, or a scalar, their sum
    grad_hidden: [N, H]
    grad_weight: [V, H]; of `main_grad`, which every run adds to, so far
    """

    loss: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


class Rounding(NamedTuple):
    """Where a contender rounds more than the plain formula in the dtype of the head does.

    logits_grad: the dtype that the gradient of the logits passes through
    chunk:       the weight's gradient is summed in its own dtype over chunks of so many tokens
    """

    logits_grad: torch.dtype | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class HeadContender:
    """A row of the table.

    prepare:     (weight [V, H], labels [N]) -> run(hidden [N, H]) -> HeadOutcome; of what is no
                 loss, anything. What `prepare` does is not timed
    objective:   of which the outcome must be the loss and gradients; None: there is no outcome
    gradient_in: where the weight's gradient goes, MAIN_GRAD or GRAD
    is_fused:    ours without the logits, whose memory is told in chunks
    rounding:    of (hidden [N, H], weight)
    package:     the distribution it needs
    devices:     torch device types it runs on
    """

    name: str
    what: str
    prepare: Callable[[Tensor, Tensor], Callable[[Tensor], Any]]
    objective: str | None = "nll"
    gradient_in: str = GRAD
    is_fused: bool = False
    rounding: Callable[[Tensor, Tensor], Rounding] = lambda hidden, weight: Rounding()
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")


def step(
    load: Callable[[], LossOf], gradient_in: str, weight: Tensor, labels: Tensor
) -> Callable[[Tensor], HeadOutcome]:
    """Forward and backward of the sum of the losses, and what megatron-core does with the gradient.

    Into `main_grad` as DistributedDataParallel's hook has it: what the backward has not added there
    by itself is added, and `weight.grad` is dropped.
    """
    loss_of = load()

    def run(storage: Tensor) -> HeadOutcome:
        hidden = storage.detach().requires_grad_()
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        loss = loss_of(hidden, weight, labels)
        loss.sum().backward()
        grad, weight.grad = weight.grad, None
        assert grad is not None
        assert hidden.grad is not None
        if gradient_in == MAIN_GRAD:
            main_grad: Tensor = weight.main_grad  # type: ignore[attr-defined]
            if not weight.grad_added_to_main_grad:  # type: ignore[attr-defined]
                main_grad.add_(grad)
            grad = main_grad
        return HeadOutcome(loss.detach(), hidden.grad, grad)

    return run


def _step(
    load: Callable[[], LossOf], gradient_in: str = GRAD
) -> Callable[[Tensor, Tensor], Callable[[Tensor], HeadOutcome]]:
    return partial(step, load, gradient_in)


def _logits(objective: str) -> Callable[[], LossOf]:
    def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return token_loss(logits, labels, objective, inplace_backward=True)

    return lambda: loss_of


def _fused(
    objective: str, form: str = "auto", gradient_in: str = GRAD
) -> Callable[[Tensor, Tensor], Callable[[Tensor], HeadOutcome]]:
    def prepare(weight: Tensor, labels: Tensor) -> Callable[[Tensor], HeadOutcome]:
        # what a data loader knows, and a GPU cannot be asked without waiting for it
        kept = max(1, int((labels != IGNORE).sum())) if labels.is_cuda else None

        def loss_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return fused_linear_loss(
                hidden,
                weight,
                labels,
                objective,
                form=form,
                main_grad=gradient_in == MAIN_GRAD,
                kept_tokens=kept,
            )[0]

        return step(lambda: loss_of, gradient_in, weight, labels)

    return prepare


def _products(weight: Tensor, labels: Tensor) -> Callable[[Tensor], Any]:
    """Of the kept tokens alone: nobody computes less."""
    rows = (labels != IGNORE).nonzero()[:, 0]
    weight = weight.detach()

    def run(hidden: Tensor) -> tuple[Tensor, Tensor]:
        kept = hidden[rows]
        logits = F.linear(kept, weight)
        return logits @ weight, logits.t() @ kept

    return run


def _eager_nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE)


def _liger(**options: Any) -> Callable[[], LossOf]:
    def load() -> LossOf:
        from liger_kernel.transformers.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyLoss,
        )

        cross_entropy = LigerFusedLinearCrossEntropyLoss(
            ignore_index=IGNORE, reduction="sum", **options
        )
        return lambda hidden, weight, labels: cross_entropy(weight, hidden, labels)

    return load


def _liger_rounding(hidden: Tensor, weight: Tensor) -> Rounding:
    """Its chunks: as many logits as hidden states, a power of two of tokens."""
    tokens, width = hidden.shape
    share = -(-tokens // -(-weight.shape[0] // width))
    return Rounding(None, min(tokens, 1 << (share - 1).bit_length()))


def contenders(objective: str) -> dict[str, HeadContender]:
    """Every contender by name. `objective` is a spec, of what is ours."""
    parsed = parse(objective)
    spec, name = parsed.spec, parsed.name
    in_main_grad, fused = _fused(spec, gradient_in=MAIN_GRAD), _fused(spec)
    table = [
        HeadContender("logits-main-grad", f"F.linear, token_loss {name}, main_grad += grad",
                      _step(_logits(spec), MAIN_GRAD), spec, MAIN_GRAD),
        HeadContender("fused-main-grad", f"fused_linear_loss {name}, into main_grad",
                      in_main_grad, spec, MAIN_GRAD, is_fused=True),
        HeadContender("megatron", "megatron-core ColumnParallelLinear, fused cross-entropy, nll, "
                      "main_grad += grad", _step(peers.megatron_head, MAIN_GRAD),
                      gradient_in=MAIN_GRAD, package="megatron-core",
                      rounding=lambda hidden, weight: Rounding(torch.bfloat16)),
        HeadContender("logits", f"F.linear, token_loss {name}",
                      _step(_logits(spec)), spec),
        HeadContender("fused", f"fused_linear_loss {name}", fused, spec, is_fused=True),
        HeadContender("fused-forward", f"fused_linear_loss {name}, form forward",
                      _fused(spec, "forward"), spec, is_fused=True),
        HeadContender("eager-nll", "F.linear, F.cross_entropy in fp32, nll",
                      _step(lambda: _eager_nll)),
        HeadContender("liger", "LigerFusedLinearCrossEntropyLoss, nll", _step(_liger()),
                      package="liger-kernel", devices=("cuda",), rounding=_liger_rounding),
        HeadContender("liger-fp32-sums", "the same, weight gradient summed in fp32",
                      _step(_liger(accum_dtype=torch.float32)),
                      package="liger-kernel", devices=("cuda",)),
        HeadContender("products", "the three matrix products of the kept tokens alone",
                      _products, None),
    ]  # fmt: skip
    return {contender.name: contender for contender in table}
