"""`token_loss`: any objective on logits whose vocabulary may be split over ranks.

From logits to gradient, in order: the statistics of this rank's shard (one read of the logits), one
all-gather of 5 floats per token, the merge that every rank does alike, the objective on O(N)
floats, and in the backward the gradient `gate * (p_i - 1[i = y])` (one read, one write).

With `grad_in_forward` the gradient is made together with the statistics while a row is on chip (one
read, one write in all), and the backward only multiplies the rows whose upstream is not 1.
"""

from dataclasses import dataclass
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
from megatron_deft.objectives import Gate, Objective, Statistics, parse


@dataclass(frozen=True)
class TokenStatistics:
    """What a call of `token_loss` saw, detached, each of the labels' shape (see `Statistics`).

    loss, gate: fp32, the objective's; 0 where keep is false
    keep:       bool, the tokens that count: neither ignored nor dropped by the objective's
                threshold. A mean over tokens divides by their number.
    """

    loss: Tensor
    gate: Tensor
    keep: Tensor
    logp: Tensor
    p: Tensor
    collision: Tensor
    entropy: Tensor
    is_argmax: Tensor
    valid: Tensor


@dataclass(frozen=True)
class _Merged:
    """Statistics over the whole vocabulary, [N] fp32, and the top logits [k, N] if asked for."""

    row_max: Tensor
    sum_exp: Tensor
    logp: Tensor
    collision: Tensor
    entropy: Tensor
    is_argmax: Tensor
    top: Tensor | None


def all_gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[rows, N] on each rank -> [ranks, rows, N] on every rank, in rank order."""
    if group is None or dist.get_world_size(group) == 1:
        return local[None]
    ranks, (rows, tokens) = dist.get_world_size(group), local.shape
    gathered = local.new_empty(ranks * rows, tokens)  # gloo wants the shards end to end
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered.view(ranks, rows, tokens)


def merge(parts: Tensor, valid: Tensor) -> _Merged:
    """Combine the shards' sums [ranks, 5 + k, N] into statistics of the whole row.

    m_r are the shards' maxima and M theirs; a shard's sums are brought from m_r to M by
    f = exp(m_r - M): S1 by f, S2 by f^2, and Sh = f (Sh_r + (m_r - M) S1_r). S1 - 1, which
    `row_stats` gives, keeps its digits: the 1 that is left out belongs to the shard of the maximum.
    """
    shard_max, rest, s2, sh, target = parts[:, :5].unbind(1)
    row_max, owner = shard_max.max(0)
    shift = shard_max - row_max
    factor = shift.exp()
    # An empty or negligible shard has f = 0 and perhaps shift = -inf: its term is 0, not nan.
    sh = (factor * (sh + shift * (1.0 + rest))).masked_fill(factor == 0, 0.0).sum(0)
    rest = (factor * rest).sum(0) + factor.scatter(0, owner[None], 0.0).sum(0)
    s1 = 1.0 + rest
    s2 = (factor.square() * s2).sum(0)
    target = target.sum(0)  # one rank owns the target, the others hold 0
    top = None
    if parts.shape[1] > 5:
        k = parts.shape[1] - 5
        top = parts[:, 5:].flatten(0, 1).topk(k, dim=0).values
    return _Merged(
        row_max=row_max,
        sum_exp=s1,
        logp=target - row_max - rest.log1p(),
        collision=s2 / s1.square(),
        entropy=rest.log1p() - sh / s1,
        is_argmax=(target >= row_max) & valid,
        top=top,
    )


def _topk_entropy(top: Tensor, valid: Tensor) -> Tensor:
    """Entropy in nats of softmax over the k largest logits [k, N], largest first -> [N].

    log1p of the others' sum, so that an entropy near 0 keeps its digits.
    """
    d = top[1:] - top[0]
    e = d.exp()
    others = e.sum(0)
    entropy = others.log1p() - (e * d).masked_fill(e == 0, 0.0).sum(0) / (1.0 + others)
    return entropy.masked_fill(~valid, 0.0)


def _batch_mean(p: Tensor, valid: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Mean of p over the valid tokens of all ranks of `group`; 0 when there is none."""
    total = torch.stack([p.sum(), valid.sum()])
    if group is not None:
        # every rank's tokens belong to the one batch whose mean the objective is defined on
        dist.all_reduce(total, group=group)
    return total[0] / total[1].clamp(min=1.0)


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
        merged = merge(all_gather(local, shard.group), flat_valid)
        p = merged.logp.exp().masked_fill(~flat_valid, 0.0)
        loss, gate, keep = objective(
            Statistics(
                logp=merged.logp,
                p=p,
                collision=merged.collision,
                entropy=merged.entropy,
                is_argmax=merged.is_argmax,
                valid=flat_valid,
                topk_entropy=None if merged.top is None else _topk_entropy(merged.top, flat_valid),
                mean_p=_batch_mean(p, flat_valid, batch_group) if objective.batch_mean else None,
                vocab_size=shard.vocab_size,
            )
        )
        if gate_in_forward is None:
            ctx.save_for_backward(logits, labels, merged.row_max, merged.sum_exp, merged.logp, gate)
        else:
            ctx.save_for_backward(grad, labels)
        ctx.shard, ctx.inplace = shard, inplace
        ctx.is_grad_made = gate_in_forward is not None
        per_token = (loss, gate, keep, merged.logp, p, merged.collision, merged.entropy)
        outputs = tuple(t.reshape(labels.shape) for t in (*per_token, merged.is_argmax))
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
    shard = shard_of(logits, labels, objective, group, vocab_size, ignore_index)
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
