"""`token_loss`: any objective on logits whose vocabulary may be split over ranks.

From logits to gradient, in order: the statistics of this rank's shard (one read of the logits), one
all-gather of 5 floats per token, the merge that every rank does alike, the objective on O(N)
floats, and in the backward the gradient `gate * (p_i - 1[i = y])` (one read, one write).

With `grad_in_forward` the gradient is made together with the statistics while a row is on chip (one
read, one write in all), and the backward only multiplies the rows whose upstream is not 1.
"""

from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft import ops
from megatron_deft.loss.inputs import (
    Shard,
    check_batch_group,
    check_labels,
    check_tensors,
    gate_of,
    shard_of,
)
from megatron_deft.loss.statistics import TokenStatistics, all_gather, combine, judge
from megatron_deft.objectives import Gate, Objective, parse


class _TokenLoss(torch.autograd.Function):
    """Outputs: loss (differentiable), then gate, keep, logp, p, collision, entropy, is_argmax."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        objective: Objective,
        shard: Shard,
        batch_group: dist.ProcessGroup | None,
        inplace: bool,
        gate_in_forward: Gate | None,
    ) -> tuple[Tensor, ...]:
        flat_valid = (labels != shard.ignore_index).reshape(-1)
        if gate_in_forward is None:
            local = ops.row_stats(
                logits, labels, shard.start, shard.valid, shard.ignore_index, objective.topk
            )
        else:
            local, grad = ops.row_stats_grad(
                logits, labels, gate_in_forward, shard.valid, shard.ignore_index, inplace=inplace
            )
        # the softmax is over the whole vocabulary, of which every rank has reduced its slice
        sums = combine(all_gather(local, shard.group))
        judged = judge(sums, flat_valid, objective, shard.vocab_size, batch_group)
        if gate_in_forward is None:
            ctx.save_for_backward(logits, labels, *vars(judged.softmax).values(), judged.gate)
        else:
            ctx.save_for_backward(grad, labels)
        ctx.shard, ctx.inplace = shard, inplace
        ctx.is_grad_made = gate_in_forward is not None
        outputs = tuple(t.reshape(labels.shape) for t in judged.outputs())
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            # In place it is the logits' memory, but not the logits: it has no history.
            grad = _TokenLoss._gradient(ctx, grad_loss).detach()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            grad = _NoSecondDerivative.apply(grad.requires_grad_())
        return grad, *(None,) * 6

    @staticmethod
    def _gradient(ctx: Any, grad_loss: Tensor) -> Tensor:
        shard: Shard = ctx.shard
        upstream = grad_loss.reshape(-1).float().contiguous()  # a sum gives stride 0
        if ctx.is_grad_made:
            grad, labels = ctx.saved_tensors
            ops.scale_rows_(grad, labels, upstream, shard.ignore_index)
            return grad
        logits, labels, row_max, sum_exp, logp, gate = ctx.saved_tensors
        coeff = upstream * gate
        return ops.gate_grad(
            logits,
            labels,
            row_max,
            coeff / sum_exp,
            coeff * logp.expm1(),
            shard.start,
            shard.valid,
            shard.ignore_index,
            inplace=ctx.inplace,
        )


class _NoSecondDerivative(torch.autograd.Function):
    """The gradient as it is, with an error in the place of its derivative.

    torch's once_differentiable raises only where the upstream gradient has one to take; after a
    plain `loss.sum()` it would leave the term out without a word.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError(
            "token_loss has no second derivative: compute the loss in plain torch to take one"
        )


@overload
def token_loss(
    logits: Tensor,
    labels: Tensor,
    objective: str | Objective = ...,
    *,
    group: dist.ProcessGroup | None = ...,
    vocab_size: int | None = ...,
    ignore_index: int = ...,
    inplace_backward: bool = ...,
    grad_in_forward: bool = ...,
    batch_group: dist.ProcessGroup | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def token_loss(
    logits: Tensor,
    labels: Tensor,
    objective: str | Objective = ...,
    *,
    group: dist.ProcessGroup | None = ...,
    vocab_size: int | None = ...,
    ignore_index: int = ...,
    inplace_backward: bool = ...,
    grad_in_forward: bool = ...,
    batch_group: dist.ProcessGroup | None = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, TokenStatistics]: ...
def token_loss(
    logits: Tensor,
    labels: Tensor,
    objective: str | Objective = "deft",
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    grad_in_forward: bool = False,
    batch_group: dist.ProcessGroup | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """The objective's loss of every token, differentiable in `logits`.

    logits:           [..., V_local] fp32, bf16 or fp16, contiguous or a view with the vocabulary
                      last and rows of two strides, such as z[:, :-1] and z.transpose(0, 1) (others
                      are copied, or in place refused); V_local is V, or with
                      `group` this rank's slice: rank r holds columns r * V_local and on
    labels:           [...] int64 or int32, global indices < vocab_size, or ignore_index; already
                      shifted (labels[t] is what logits[t] predicts); the same on all ranks of
                      `group`
    objective:        a spec such as "deft", "dft", "tsallis(q=0.5)" (see `objectives.OBJECTIVES`)
    group:            torch.distributed process group over which the vocabulary is sharded
    vocab_size:       number of real entries; columns from there on are padding: they take no part
                      and get gradient 0. Default: V_local times the size of `group`.
    inplace_backward: the gradient is written over the logits, which are gone after backward(): no
                      memory beyond the logits. A second backward, or a use of the logits before
                      this call that needs their values, is an error of autograd; so are logits that
                      are one of several views of a tensor (chunk, split). Meant for logits that a
                      layer computed: the .grad of a leaf would be the leaf's own memory.
    grad_in_forward:  make the gradient together with the loss, from a single read of the logits,
                      for an upstream gradient of 1 per token; the backward multiplies the rows
                      whose upstream is another (and rounds them once more), once. With
                      inplace_backward the logits are gone after this call, and whoever reads them
                      later reads the gradient, without an error. Pays where the loss is summed, as
                      under megatron-core's calculate_per_token_loss; costs where it is averaged.
                      Refused with a split vocabulary, a batch mean (cayley) or fp16 logits. Without
                      a gradient to make (no_grad) it changes nothing.
    batch_group:      ranks whose tokens share the batch mean that `cayley` needs
    return_stats:     return (loss, TokenStatistics)

    returns: fp32 loss of the labels' shape, 0 where a label is ignored or the objective drops the
    token. Its gradient accepts any per-token upstream; a second derivative is an error.
    Errors: UserError (a ValueError) naming what was expected, what was given and the mend. A label
    out of range is one on the CPU; on CUDA, where asking would stop the stream, its loss is nan and
    `loss.inputs.raise_on_wrong_labels()` raises it at the next convenient moment; under
    torch.compile its loss is nan, no more. That the ranks of `group` agree about shapes, labels and
    objective is asked once for each size of shard.
    Formulas: `megatron-deft objectives`; DEFT: arXiv 2602.11424.
    """
    objective = parse(objective)
    logits, labels = check_tensors(logits, labels, inplace_backward)
    shard = shard_of(
        logits.shape[-1], logits.dtype, labels, objective, group, vocab_size, ignore_index
    )
    wrong = check_labels(labels, shard)
    check_batch_group(objective, batch_group)
    gate = gate_of(objective, shard, logits, grad_in_forward)
    loss, *rest = _TokenLoss.apply(
        logits, labels, objective, shard, batch_group, inplace_backward, gate
    )
    if wrong is not None:
        loss = loss.masked_fill(wrong, torch.nan)
    if not return_stats:
        return loss
    fields = (loss.detach(), *rest, labels != ignore_index)
    return loss, TokenStatistics(*fields)
