"""`fused_linear_loss`: language-model head and objective in one operator, without the logits.

In order: tokens whose label is ignored leave before the first matrix product; of the rest, logits
exist a tile at a time (loss/linear_head.py); which tiles are made when is the form's matter
(loss/linear_forms.py); what comes out takes its place among all tokens again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft.errors import UserError
from megatron_deft.loss.inputs import (
    DTYPES,
    check_batch_group,
    check_head,
    check_labels,
    check_main_grad,
    check_numbers,
    check_strided,
    check_token_weight,
    shard_of,
)
from megatron_deft.loss.linear_forms import InForward, Job, Recompute, form_of
from megatron_deft.loss.linear_head import Head, plan_of
from megatron_deft.loss.statistics import TokenStatistics
from megatron_deft.objectives import Objective, parse


@torch.compiler.disable
def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    objective: str | Objective = "deft",
    *,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    token_weight: Tensor | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    batch_group: dist.ProcessGroup | None = None,
    reduction: str = "sum",
    form: str = "auto",
    main_grad: bool = False,
    kept_tokens: int | None = None,
) -> tuple[Tensor, TokenStatistics]:
    """The objective's loss from hidden states and head, without the logits [tokens, vocabulary].

    hidden:       [..., H] fp32, bf16 or fp16
    weight:       [V_local, H] of the same dtype: the head's, whole, or with `group` this rank's
                  slice of the vocabulary: rank r holds entries r * V_local and on
    labels:       [...] int64 or int32, as `token_loss` takes them: already shifted, global, the
                  same on all ranks of `group`. A token with ignore_index costs nothing.
    objective:    a spec such as "deft" (see `objectives.OBJECTIVES`)
    group:        process group over which the vocabulary is sharded. The gradient of `hidden` is
                  summed over it, as megatron-core's ColumnParallelLinear does.
    sequence_parallel: each rank of `group` holds hidden states of its part of the first dimension
                  (labels: of all); they are gathered once, and the gradient is reduce-scattered
    token_weight: [...] what the loss of each token is multiplied by; a constant. None: 1
    vocab_size:   number of real entries; rows of the weight from there on are padding: they take
                  no part and get gradient 0. Default: V_local times the size of `group`
    chunk_tokens: how many rows of logits may exist at a time. None: 40 MiB of them on the CPU, 64
                  in fp32; on a GPU 1 GiB, and at least 4096
    bias:         [V_local], added to the logits
    softcap:      logits become softcap * tanh(logits / softcap), as Gemma 2's
    batch_group:  ranks whose tokens share the batch mean that `cayley` needs
    reduction:    "sum": the loss is a scalar, the sum of token_weight * loss. "none": it has the
                  labels' shape, 0 where ignored; takes any upstream gradient, and no token_weight
    form:         how it is computed: "recompute", "forward" or "auto" (see loss/linear_forms.py)
    main_grad:    add the gradient of the weight to `weight.main_grad` and tell megatron-core's
                  DistributedDataParallel so, as its gradient_accumulation_fusion does
    kept_tokens:  an upper bound of the labels that are not ignored, the same on all ranks of
                  `group`, for CUDA, where counting them would stop the stream. None: the CPU
                  counts, CUDA computes every token. Too low a bound is an error, on CUDA a nan loss

    returns: the loss, fp32, differentiable in hidden, weight and bias, and TokenStatistics,
    detached, of the labels' shape. A mean divides by `statistics.keep.sum()`. A second derivative
    is an error.
    Errors: UserError (a ValueError) naming what was expected, what was given and the mend; about
    labels and ranks as in `token_loss`.
    Without a gradient to make (no_grad) it is the forward of "recompute", and keeps no logits.
    """
    objective = parse(objective)
    check_strided(weight=weight, hidden=hidden, labels=labels, bias=bias)
    parameter = weight if main_grad else None
    hidden, weight, bias = _under_autocast(hidden, weight, bias)
    labels = check_head(hidden, weight, labels, bias, group if sequence_parallel else None)
    check_numbers(softcap=softcap, chunk_tokens=chunk_tokens, kept_tokens=kept_tokens)
    token_weight = check_token_weight(token_weight, labels, reduction)
    check_main_grad(parameter)
    # which decide how often the ranks meet, and with how many tokens
    meetings = {"chunk_tokens": chunk_tokens, "form": form, "kept_tokens": kept_tokens}
    columns = weight.shape[0]
    shard = shard_of(
        columns, weight.dtype, labels, objective, group, vocab_size, ignore_index, meetings
    )
    wrong = check_labels(labels, shard)
    check_batch_group(objective, batch_group)

    flat = labels.reshape(-1)
    kept = hidden.reshape(-1, hidden.shape[-1])
    if sequence_parallel and not shard.is_whole:
        kept = _GatherSequence.apply(kept, group)
    rows = _kept_rows(flat != ignore_index, kept_tokens)
    if rows is not None:
        kept, flat, token_weight = (t.index_select(0, rows) for t in (kept, flat, token_weight))
    if not sequence_parallel and not shard.is_whole:
        kept = _SumGradient.apply(kept, group)

    # a loss of 0 may not meet a weight of inf
    token_weight = token_weight.masked_fill(flat == ignore_index, 0.0)

    plan = plan_of(weight, flat.numel(), chunk_tokens, softcap)
    form = form_of(form, objective, weight, flat.numel(), plan.chunk_tokens, main_grad, reduction)
    is_training = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, bias)
    )
    if form == "forward":
        plan = plan.in_rows(1 if shard.is_whole else 2)
    head = Head(kept, weight, bias, flat, shard, softcap, plan)
    job = Job(objective, batch_group, is_training, parameter)
    with torch.autocast(weight.device.type, enabled=False):
        if form == "forward" and is_training:
            loss, *outputs = InForward.apply(kept, weight, bias, token_weight, head, job)
        else:
            outputs = Recompute.apply(kept, weight, bias, head, job)
            loss = outputs[0] if reduction == "none" else (outputs[0] * token_weight).sum()
    spoiled = _spoiled(labels, wrong, rows, ignore_index)
    if reduction == "none":
        loss = _spread(loss, rows, labels)
    if spoiled is not None:
        loss = loss.masked_fill(spoiled if reduction == "none" else spoiled.any(), torch.nan)
    fields = [_spread(value.detach(), rows, labels) for value in outputs]
    return loss, TokenStatistics(*[*fields, labels != ignore_index])


class _SumGradient(torch.autograd.Function):
    """The identity; the backward sums the gradient over the ranks, which hold parts of it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        # each rank's slice of the vocabulary gave its part of the same hidden states' gradient
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _GatherSequence(torch.autograd.Function):
    """[N / ranks, H] of each rank -> [N, H]; the backward sums and scatters."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = hidden.new_empty(hidden.shape[0] * dist.get_world_size(group), hidden.shape[1])
        # under sequence parallelism each rank holds some tokens, and the head needs all of them
        dist.all_gather_into_tensor(total, hidden.contiguous(), group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mine = grad.new_empty(grad.shape[0] // dist.get_world_size(ctx.group), grad.shape[1])
        # the sum of the ranks' parts, of which each keeps its own tokens
        dist.reduce_scatter_tensor(mine, grad.contiguous(), group=ctx.group)
        return mine, None


def _kept_rows(valid: Tensor, kept_tokens: int | None) -> Tensor | None:
    """Which of [N] tokens go through the head, in order; None: all.

    With a bound: so many, ignored ones in the places that are left. CUDA needs one, because asking
    for the number would stop the stream.
    """
    if kept_tokens is None and not valid.is_cuda:
        kept_tokens = int(valid.sum())
    if kept_tokens is None or kept_tokens >= valid.numel():
        return None
    if not valid.is_cuda and kept_tokens < int(valid.sum()):
        raise UserError(
            f"kept_tokens={kept_tokens} is below the {int(valid.sum())} labels that are not ignored"
        )
    return torch.argsort((~valid).byte(), stable=True)[:kept_tokens]


def _under_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """In autocast's dtype, as a linear layer's are: all but float64 and integers."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype in DTYPES else t for t in tensors)


def _spread(values: Tensor, rows: Tensor | None, labels: Tensor) -> Tensor:
    """Of kept tokens -> of all, in the labels' shape; 0 where a token was left out."""
    if rows is not None:
        values = values.new_zeros(labels.numel()).index_copy(0, rows, values)
    return values.reshape(labels.shape)


def _spoiled(
    labels: Tensor, wrong: Tensor | None, rows: Tensor | None, ignore_index: int
) -> Tensor | None:
    """The tokens whose loss has to be nan on CUDA, by a label out of range or too low a bound."""
    if rows is None or not labels.is_cuda:
        return wrong
    too_low = (labels != ignore_index).sum() > rows.numel()
    return too_low.expand(labels.shape) if wrong is None else wrong | too_low
