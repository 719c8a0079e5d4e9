"""The two forms of `fused_linear_loss`, and which of them runs.

recompute  The forward makes every tile of logits for its sums, gathers them over the
           tensor-parallel ranks, once, and lets the objective judge all tokens. The backward makes
           the tiles again, and their gradients. Any objective, any upstream gradient per token; the
           weight's gradient goes straight into `main_grad` where there is one. 4 matrix products,
           3 for the tiles that could be kept: all, where the kept tokens fit one chunk.
forward    The forward makes the gradients too, for an upstream gradient of token_weight, chunk by
           chunk, the gather of one behind the product of the next. The backward multiplies them by
           one number. 3 matrix products; the weight's gradient waits in fp32 for the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft.errors import UserError
from megatron_deft.loss.linear_head import Gradients, Head, Span, Tiles
from megatron_deft.loss.statistics import (
    Judged,
    Softmax,
    all_gather,
    combine,
    judge,
    start_all_gather,
)
from megatron_deft.objectives import Objective

FORMS = ("auto", "recompute", "forward")


def obstacle_to_forward(
    objective: Objective, dtype: torch.dtype, main_grad: bool, reduction: str
) -> str:
    """Why the gradients cannot be made in the forward, or "" if they can."""
    if objective.batch_mean:
        return f"objective {objective.spec} needs a mean over the batch before any gradient"
    if dtype == torch.float16:
        return "a float16 gradient needs the loss scale before it is rounded"
    if reduction != "sum":
        return "the loss of every token takes upstream gradients that are not known before"
    if main_grad:
        return "what is added to main_grad cannot be multiplied by the upstream gradient later"
    return ""


def form_of(
    form: str,
    objective: Objective,
    weight: Tensor,
    tokens: int,
    chunk_tokens: int,
    main_grad: bool,
    reduction: str,
) -> str:
    """The form for `tokens` kept tokens: the one place that decides.

    auto: "forward" where it saves matrix products (several chunks) and nothing stands against it,
    on a GPU. On the CPU "recompute", whose tiles of many tokens and few columns make up for its
    fourth product.
    """
    if form not in FORMS:
        raise UserError(f"form={form}: legal are {', '.join(FORMS)}")
    if form == "recompute":
        return form
    obstacle = obstacle_to_forward(objective, weight.dtype, main_grad, reduction)
    if form == "forward":
        if obstacle:
            raise UserError(f'form=forward: {obstacle}; use form="recompute"')
        return form
    pays = weight.is_cuda and tokens > chunk_tokens
    return "forward" if pays and not obstacle else "recompute"


@dataclass(frozen=True)
class Job:
    """What both forms are asked for.

    is_training: a gradient is wanted
    parameter:   the weight itself, if its gradient is added to its main_grad; else None
    """

    objective: Objective
    batch_group: dist.ProcessGroup | None
    is_training: bool
    parameter: Tensor | None


class Recompute(torch.autograd.Function):
    """Outputs of kept tokens [N]: loss (differentiable), then those of `Judged.outputs`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, job: Job
    ) -> tuple[Tensor, ...]:
        """Sums of all tiles, gathered, and judged."""
        shard = head.shard
        tiles = Tiles(head)
        # the softmax is over the whole vocabulary, of which every rank has reduced its slice
        sums = combine(
            all_gather(tiles.sums(job.objective.topk, keep=job.is_training), shard.group)
        )
        valid = head.labels != shard.ignore_index
        judged = judge(sums, valid, job.objective, shard.vocab_size, job.batch_group)
        # All that it reads again: a change before the backward is an error, and who keeps the loss
        # beyond it keeps no activations. An output as an attribute would be a cycle through them.
        softmax = vars(judged.softmax).values()
        ctx.save_for_backward(hidden, weight, bias, head.labels, judged.gate, *softmax)
        ctx.settings, ctx.kept = (shard, head.softcap, head.plan), tiles.kept
        ctx.parameter = job.parameter
        outputs = judged.outputs()
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """All tiles again, as gradients."""
        _refuse_second_derivative()
        hidden, weight, bias, labels, gate, *softmax = ctx.saved_tensors
        head = Head(hidden, weight, bias, labels, *ctx.settings)
        # the caller may run this under autocast, the forward's products were not
        with torch.no_grad(), torch.autocast(upstream.device.type, enabled=False):
            grads = _room_for_gradients(head, ctx.needs_input_grad, ctx.parameter)
            coeff = upstream.float() * gate
            Tiles(head, kept=ctx.kept).gradients(Softmax(*softmax), coeff, grads)
            return *_handed_on(grads, _dtypes(hidden, weight, bias), ctx.parameter), None, None


class InForward(torch.autograd.Function):
    """Outputs: sum of token_weight * loss (differentiable), then `Judged.outputs` of [N] tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_weight: Tensor,
        head: Head,
        job: Job,
    ) -> tuple[Tensor, ...]:
        """Loss and gradients, chunk by chunk."""
        wanted = ctx.needs_input_grad if job.is_training else (False, False, False)
        grads = _room_for_gradients(head, wanted, form="forward")
        outputs = _forward_in_chunks(head, job, token_weight, grads)
        ctx.grads, ctx.dtypes = grads, _dtypes(hidden, weight, bias)
        total = (outputs[0] * token_weight).sum()
        ctx.mark_non_differentiable(*outputs)
        return total, *outputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradients times the one number they waited for."""
        _refuse_second_derivative()
        if ctx.grads is None:
            raise RuntimeError(
                'fused_linear_loss(form="forward") has handed its gradients on: a second backward '
                'needs form="recompute"'
            )
        grads, ctx.grads = ctx.grads, None
        with torch.no_grad():
            for grad in (grads.hidden, grads.weight, grads.bias):
                if grad is not None:
                    grad.mul_(upstream)
            return *_handed_on(grads, ctx.dtypes, None), None, None, None


def _forward_in_chunks(
    head: Head, job: Job, token_weight: Tensor, grads: Gradients
) -> tuple[Tensor, ...]:
    """Gradients of all chunks into `grads`; what was judged, of all tokens.

    The gather of a chunk's sums runs while the logits of the next are made.
    """
    shard, column = head.shard, (0, head.shard.valid)
    judged: list[Judged] = []
    waiting: list[tuple[Tensor, Span, Callable[[], Tensor]]] = []
    block = grads.block(column, len(head.rows))

    def finish(z: Tensor, row: Span, gather: Callable[[], Tensor]) -> None:
        valid = head.labels[slice(*row)] != shard.ignore_index
        verdict = judge(combine(gather()), valid, job.objective, shard.vocab_size, None)
        judged.append(verdict)
        if job.is_training and shard.valid:
            coeff = token_weight[slice(*row)] * verdict.gate
            z = head.gradient(z, row, column, verdict.softmax, coeff)
            grads.add(head, z, row, column, block, first=len(judged) == 1)

    for row in head.rows:
        z = head.logits(row, column)
        local = head.sums(z, row, column, job.objective.topk)
        waiting.append((z, row, start_all_gather(local, shard.group)))
        if shard.is_whole or len(waiting) == 2:
            finish(*waiting.pop(0))
        del z
    for rest in waiting:
        finish(*rest)
    grads.close(column, block)
    if not judged:
        empty = head.labels.new_zeros(0, dtype=torch.float32)
        return (empty, empty, empty.bool(), *(empty,) * 4, empty.bool())
    return tuple(torch.cat(parts) for parts in zip(*(j.outputs() for j in judged), strict=True))


def _room_for_gradients(
    head: Head, wanted: Sequence[bool], parameter: Tensor | None = None, form: str = "recompute"
) -> Gradients:
    """Where the gradients of hidden, weight and bias go, for those of the three that are wanted."""
    hidden = weight = bias = None
    if wanted[0]:
        once = form == "recompute" and len(head.columns) == 1
        hidden = torch.zeros_like(head.hidden, dtype=head.hidden.dtype if once else torch.float32)
    if wanted[1]:
        if parameter is not None:
            weight = parameter.main_grad  # type: ignore[attr-defined]
        else:
            dtype = head.weight.dtype if form == "recompute" else torch.float32
            weight = torch.empty_like(head.weight, dtype=dtype)
            # what no tile reaches: the vocabulary's padding, or all where no token is kept
            weight[head.shard.valid if head.rows else 0 :].zero_()
    if wanted[2]:
        bias = head.weight.new_zeros(head.weight.shape[0], dtype=torch.float32)
    return Gradients(hidden, weight, bias, adds=parameter is not None)


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(t if t is None else t.dtype for t in tensors)


def _handed_on(
    grads: Gradients, dtypes: Sequence[torch.dtype | None], parameter: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients as autograd takes them, in the dtypes of what they belong to."""
    hidden, weight, bias = grads.hidden, grads.weight, grads.bias
    if parameter is not None and weight is not None:
        # As megatron-core's own layer: the flag tells DistributedDataParallel that it is done, and
        # the tensor, which nobody reads, makes autograd call its hook. A weight that also embeds
        # gets its other gradient added to it, and has to have zeros.
        parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        is_read = getattr(parameter, "zero_out_wgrad", False)
        weight = (torch.zeros_like if is_read else torch.empty_like)(parameter)
    made = zip((hidden, weight, bias), dtypes, strict=True)
    return tuple(grad if grad is None else grad.to(dtype) for grad, dtype in made)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fused_linear_loss has no second derivative: call backward without create_graph"
        )
