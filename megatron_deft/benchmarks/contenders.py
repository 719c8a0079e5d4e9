"""What is compared: one table of contenders, each a way from logits to loss and gradient.

Every step is measured alike: from logits that some layer made (not a leaf) to the gradient on them,
with `loss.sum()` as the scalar, so the upstream gradient of every token is 1. The loss of every
token comes out as well, except where a row says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_deft import ops
from megatron_deft.benchmarks import peers
from megatron_deft.benchmarks.arguments import BANDWIDTH, KERNEL, STEP, WHOLE_ROW
from megatron_deft.benchmarks.peers import IGNORE
from megatron_deft.errors import UserError
from megatron_deft.loss.vocab_parallel import token_loss
from megatron_deft.objectives import parse


class Outcome(NamedTuple):
    """What a contender computed.

    loss: [N] of every token, a scalar (their sum), or None
    grad: [N, V] of the sum of the losses by the logits, or None
    """

    loss: Tensor | None = None
    grad: Tensor | None = None


class Prepared(NamedTuple):
    """`run(logits)` is what is timed; it may overwrite logits. `outcome` reads its result."""

    run: Callable[[Tensor], Any]
    outcome: Callable[[Any], Outcome] = lambda result: result


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    prepare:   (logits [N, V], labels [N]) -> Prepared; what it does is not timed
    objective: of which the outcome must be the loss and gradient
    passes:    reads and writes of the logits that it cannot do without, if that is known
    package:   the distribution it needs
    devices:   torch device types it runs on
    rounds_to: dtype the gradient passes through, when coarser than the logits'
    """

    name: str
    what: str
    kind: str
    prepare: Callable[[Tensor, Tensor], Prepared]
    objective: str = "nll"
    passes: int | None = None
    package: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    rounds_to: torch.dtype | None = None


class _Produce(torch.autograd.Function):
    """Logits as a layer hands them on: with a history, so that they may be overwritten."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, produced: list[Tensor]) -> Tensor:
        return produced.pop()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, None]:
        raise AssertionError("only the gradient on the logits is asked for")


def _alias(storage: Tensor) -> Tensor:
    """The same memory as a tensor of its own: a view is not what a layer returns."""
    new = storage.new_empty(0)
    return new.set_(storage.untyped_storage(), 0, storage.shape, storage.stride())


def step(loss_of: Callable[[Tensor, Tensor], Tensor], labels: Tensor) -> Prepared:
    """Forward and backward of `loss_of(logits, labels)`."""

    def run(storage: Tensor) -> Outcome:
        anchor = torch.empty(0, requires_grad=True)
        logits = _Produce.apply(anchor, [_alias(storage)])
        loss = loss_of(logits, labels)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        return Outcome(loss.detach(), grad)

    return Prepared(run)


def _ours(objective: str, prefix: str, title: str) -> list[Contender]:
    """The four forms of token_loss."""
    table = [
        ("inplace-single", "in place, one read", True, True, 2),
        ("inplace-two", "in place, two reads", True, False, 3),
        ("out-single", "out of place, one read", False, True, 2),
        ("out-two", "out of place, two reads", False, False, 3),
    ]

    def form(inplace: bool, single: bool) -> Callable[[Tensor, Tensor], Prepared]:
        def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
            return token_loss(
                logits, labels, objective, inplace_backward=inplace, grad_in_forward=single
            )

        return lambda _, labels: step(loss_of, labels)

    return [
        Contender(f"{prefix}-{name}", f"token_loss {title}, {what}", STEP, form(inplace, single),
                  objective, passes)
        for name, what, inplace, single, passes in table
    ]  # fmt: skip


def _eager_nll(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORE)


def released_deft(logits: Tensor, labels: Tensor) -> Tensor:
    """The released trainer's formula; only log-probabilities are kept for the backward."""
    log_probs = logits.float().log_softmax(-1)
    valid = labels != IGNORE
    target = log_probs.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    with torch.no_grad():
        probs = log_probs.exp()
        collision = probs.pow(2).sum(-1)
        del probs
    loss = -torch.expm1(collision * target) / (collision + 1e-6)
    return loss.masked_fill(~valid, 0.0)


def _read(logits: Tensor, labels: Tensor) -> Prepared:
    return Prepared(torch.amax, lambda _: Outcome())


def _copy(logits: Tensor, labels: Tensor) -> Prepared:
    return Prepared(lambda storage: storage.copy_(logits), lambda _: Outcome())


def _row_stats(logits: Tensor, labels: Tensor) -> Prepared:
    shard = (0, logits.shape[1], IGNORE)

    def outcome(stats: Tensor) -> Outcome:
        row_max, rest, _, _, target = stats
        loss = row_max + rest.log1p() - target
        return Outcome(loss.masked_fill(labels == IGNORE, 0.0))

    return Prepared(lambda storage: ops.row_stats(storage, labels, *shard), outcome)


def _gate_grad(inplace: bool) -> Callable[[Tensor, Tensor], Prepared]:
    def prepare(logits: Tensor, labels: Tensor) -> Prepared:
        shard = (0, logits.shape[1], IGNORE)
        row_max, rest, _, _, target = ops.row_stats(logits, labels, *shard)
        rows = (row_max, (1.0 + rest).reciprocal(), (target - row_max - rest.log1p()).expm1())

        def run(storage: Tensor) -> Tensor:
            return ops.gate_grad(storage, labels, *rows, *shard, inplace=inplace)

        return Prepared(run, lambda grad: Outcome(None, grad))

    return prepare


def _row_stats_grad(spec: str) -> Callable[[Tensor, Tensor], Prepared]:
    def prepare(logits: Tensor, labels: Tensor) -> Prepared:
        gate = parse(spec).gate(logits.shape[1])
        if gate is None:
            raise UserError(f"objective {spec} needs a mean over the batch before any gradient")

        def run(storage: Tensor) -> tuple[Tensor, Tensor]:
            shard = (logits.shape[1], IGNORE)
            return ops.row_stats_grad(storage, labels, gate, *shard, inplace=True)

        return Prepared(run, lambda result: Outcome(None, result[1]))

    return prepare


def contenders(objective: str) -> dict[str, Contender]:
    """Every contender by name. `objective` is a spec; its rows are called `ours-...`."""
    spec = parse(objective).spec
    table = [
        Contender("read", "torch.amax over the logits", BANDWIDTH, _read, passes=1),
        Contender("copy", "Tensor.copy_ of the logits", BANDWIDTH, _copy, passes=2),
        Contender("row_stats", "statistics kernel", KERNEL, _row_stats, passes=1),
        Contender("gate_grad", "gradient kernel, in place", KERNEL, _gate_grad(True), passes=2),
        Contender("row_stats_grad", "both in one, in place", WHOLE_ROW, _row_stats_grad(spec),
                  spec, passes=2),
        *_ours(spec, "ours", parse(objective).name),
        *(_ours("nll", "ours-nll", "nll") if spec != "nll" else []),
        Contender("eager-nll", "torch cross_entropy in fp32", STEP,
                  lambda _, y: step(_eager_nll, y)),
        Contender("eager-deft", "released DEFT formula, eager torch", STEP,
                  lambda _, y: step(released_deft, y), "deft"),
    ]  # fmt: skip
    for peer in peers.PEERS:
        table.append(
            Contender(
                peer.name, peer.what, STEP, _peer(peer), package=peer.package,
                devices=peer.devices, rounds_to=peer.rounds_to,
            )
        )  # fmt: skip
    return {contender.name: contender for contender in table}


def _peer(peer: peers.Peer) -> Callable[[Tensor, Tensor], Prepared]:
    return lambda _, labels: step(peer.load(), labels)


def select(table: dict[str, Contender], only: str | None) -> dict[str, Contender]:
    """The contenders named in "a,b", or all. Errors: UserError listing the names."""
    if only is None:
        return table
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in table]
    if unknown or not names:
        raise UserError(
            f"--only {only}: unknown {', '.join(unknown)}; legal are {', '.join(table)}"
        )
    return {name: table[name] for name in table if name in names}
