"""`token_loss`: any objective on logits whose vocabulary may be split over ranks.

From logits to gradient, in order: the statistics of this rank's shard (one read of the logits), one
all-gather of 5 floats per token, the merge that every rank does alike, the objective on O(N)
floats, and in the backward the gradient `gate * (p_i - 1[i = y])` (one read, one write).
"""

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_deft import ops
from megatron_deft.errors import UserError
from megatron_deft.objectives import Objective, Statistics, parse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
class _Shard:
    """Which slice of the vocabulary the logits are, and where the other slices live."""

    start: int
    valid: int
    vocab_size: int
    ignore_index: int
    group: dist.ProcessGroup | None


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
    f = exp(m_r - M): S1 by f, S2 by f^2, and Sh = f (Sh_r + (m_r - M) S1_r).
    """
    shard_max, s1, s2, sh, target = parts[:, :5].unbind(1)
    row_max = shard_max.amax(0)
    shift = shard_max - row_max
    factor = shift.exp()
    # An empty or negligible shard has f = 0 and perhaps shift = -inf: its term is 0, not nan.
    sh = (factor * (sh + shift * s1)).masked_fill(factor == 0, 0.0).sum(0)
    s1 = (factor * s1).sum(0)
    s2 = (factor.square() * s2).sum(0)
    target = target.sum(0)  # one rank owns the target, the others hold 0
    s1 = s1.masked_fill(~valid, 1.0)
    top = None
    if parts.shape[1] > 5:
        k = parts.shape[1] - 5
        top = parts[:, 5:].flatten(0, 1).topk(k, dim=0).values
    return _Merged(
        row_max=row_max,
        sum_exp=s1,
        logp=target - row_max - s1.log(),
        collision=s2 / s1.square(),
        entropy=s1.log() - sh / s1,
        is_argmax=(target >= row_max) & valid,
        top=top,
    )


def _topk_entropy(top: Tensor, valid: Tensor) -> Tensor:
    """Entropy in nats of softmax over the k largest logits [k, N] -> [N]."""
    logp = top.log_softmax(0)
    p = logp.exp()
    entropy = -(p * logp).masked_fill(p == 0, 0.0).sum(0)
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
        shard: _Shard,
        batch_group: dist.ProcessGroup | None,
        inplace_backward: bool,
    ) -> tuple[Tensor, ...]:
        flat_valid = (labels != shard.ignore_index).reshape(-1)
        local = ops.row_stats(logits, labels, shard.start, shard.valid, shard.ignore_index)
        if objective.topk:
            top = ops.row_topk(logits, labels, objective.topk, shard.valid, shard.ignore_index)
            local = torch.cat([local, top])
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
        ctx.save_for_backward(logits, labels, merged.row_max, merged.sum_exp, merged.logp, gate)
        ctx.shard = shard
        ctx.inplace = inplace_backward
        per_token = (loss, gate, keep, merged.logp, p, merged.collision, merged.entropy)
        outputs = tuple(t.reshape(labels.shape) for t in (*per_token, merged.is_argmax))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        logits, labels, row_max, sum_exp, logp, gate = ctx.saved_tensors
        shard: _Shard = ctx.shard
        coeff = grad_loss.reshape(-1).float() * gate
        grad = ops.gate_grad(
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
        return grad, None, None, None, None, None


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
    batch_group: dist.ProcessGroup | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """The objective's loss of every token, differentiable in `logits`.

    logits:           [..., V_local] fp32, bf16 or fp16, contiguous or not; V_local is V, or with
                      `group` this rank's slice: rank r holds columns r * V_local and on
    labels:           [...] int64 or int32, global indices < vocab_size, or ignore_index; already
                      shifted (labels[t] is what logits[t] predicts); the same on all ranks of
                      `group`
    objective:        a spec such as "deft", "dft", "tsallis(q=0.5)" (see `objectives.OBJECTIVES`)
    group:            torch.distributed process group over which the vocabulary is sharded
    vocab_size:       number of real entries; columns from there on are padding: they take no part
                      and get gradient 0. Default: V_local times the size of `group`.
    inplace_backward: the gradient is written over the logits, which are gone after backward(): no
                      memory beyond the logits. A second backward, or another use of the logits in
                      the graph that needs their values, is an error of autograd.
    batch_group:      ranks whose tokens share the batch mean that `cayley` needs
    return_stats:     return (loss, TokenStatistics)

    returns: fp32 loss of the labels' shape, 0 where a label is ignored or the objective drops the
    token. Its gradient accepts any per-token upstream; a second derivative is an error.
    Errors: UserError (a ValueError) naming what was expected, what was given and the mend. A label
    out of range is one on the CPU; on CUDA it is a device-side assertion, which needs no
    synchronisation but ends the process.
    Formulas: `megatron-deft objectives`; DEFT: arXiv 2602.11424.
    """
    objective = parse(objective)
    logits, labels = _check_tensors(logits, labels, inplace_backward)
    shard = _shard(logits, group, vocab_size, ignore_index)
    _check_labels(labels, shard)
    _check_batch_group(objective, batch_group)
    loss, *rest = _TokenLoss.apply(logits, labels, objective, shard, batch_group, inplace_backward)
    if not return_stats:
        return loss
    valid = labels != ignore_index
    fields = (loss.detach(), *rest, valid)
    return loss, TokenStatistics(*fields)


def _check_tensors(logits: Tensor, labels: Tensor, inplace_backward: bool) -> tuple[Tensor, Tensor]:
    """The tensors as the kernels read them: int64 labels, one stride from row to row."""
    if logits.dtype not in DTYPES:
        raise UserError(
            f"logits: expected one of {', '.join(str(d) for d in DTYPES)}, got {logits.dtype}; "
            "convert them with .float()"
        )
    if logits.shape[:-1] != labels.shape or logits.dim() == 0:
        raise UserError(
            f"labels: expected shape {list(logits.shape[:-1])} (the logits' without the last "
            f"dimension), got {list(labels.shape)}"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise UserError(f"labels: expected int64 or int32, got {labels.dtype}; call .long()")
    if labels.device != logits.device:
        raise UserError(f"labels: expected device {logits.device}, got {labels.device}")
    if not _rows_are_regular(logits):
        if inplace_backward:
            raise UserError(
                f"inplace_backward needs logits whose rows are one stride apart, got shape "
                f"{list(logits.shape)} with strides {list(logits.stride())}; "
                "call .contiguous() or leave inplace_backward out"
            )
        logits = logits.contiguous()
    return logits, labels.long()


def _rows_are_regular(logits: Tensor) -> bool:
    """Whether the rows [..., V] can be walked with one stride and do not overlap."""
    if logits.numel() == 0 or logits.is_contiguous():
        return True
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        return False
    expected = None
    for dim in range(logits.dim() - 2, -1, -1):
        size, stride = logits.shape[dim], logits.stride(dim)
        if size == 1:
            continue
        if expected is None and stride < logits.shape[-1]:
            return False  # expanded or overlapping rows
        if expected is not None and stride != expected:
            return False
        expected = size * stride
    return True


def _shard(
    logits: Tensor, group: dist.ProcessGroup | None, vocab_size: int | None, ignore_index: int
) -> _Shard:
    """Where this rank's columns lie in the vocabulary."""
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    if rank < 0:
        raise UserError("group: this process is not a member of the given process group")
    columns = logits.shape[-1]
    vocab_size = columns * ranks if vocab_size is None else vocab_size
    if ranks > 1:
        _check_equal_shards(columns, vocab_size, group)
    if not 0 < vocab_size <= columns * ranks:
        raise UserError(
            f"vocab_size: expected 1 to {columns * ranks} ({ranks} rank(s) x {columns} columns), "
            f"got {vocab_size}"
        )
    start = rank * columns
    return _Shard(start, min(max(vocab_size - start, 0), columns), vocab_size, ignore_index, group)


_equal_shards: set[tuple[dist.ProcessGroup | None, int, int]] = set()


def _check_equal_shards(columns: int, vocab_size: int, group: dist.ProcessGroup | None) -> None:
    """All ranks hold as many columns; asked once per group and size, so a step costs nothing.

    Before any check that one rank alone could fail: the others would wait in the all-gather.
    """
    key = (group, columns, vocab_size)
    if key in _equal_shards:
        return
    sizes: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size(group)
    dist.all_gather_object(sizes, (columns, vocab_size), group=group)
    if len(set(sizes)) > 1:
        raise UserError(
            f"logits: expected the same number of columns and vocab_size on every rank of group, "
            f"got {sizes}; pad the vocabulary so that the ranks divide it"
        )
    _equal_shards.add(key)


def _check_labels(labels: Tensor, shard: _Shard) -> None:
    """Every label is in the vocabulary or ignored; on CUDA without stopping the stream."""
    legal = ((labels >= 0) & (labels < shard.vocab_size)) | (labels == shard.ignore_index)
    what = (
        f"labels: expected 0 to {shard.vocab_size - 1} (vocab_size {shard.vocab_size}) or "
        f"ignore_index {shard.ignore_index}"
    )
    if labels.is_cuda:
        torch._assert_async(legal.all(), what)
    elif not bool(legal.all()):
        wrong = labels[~legal][0].item()
        raise UserError(
            f"{what}, got {wrong}; check that tokenizer and model share one vocabulary, and that "
            "ignored tokens use ignore_index"
        )


def _check_batch_group(objective: Objective, batch_group: dist.ProcessGroup | None) -> None:
    """The data-parallel mean needs to be told which ranks it is over."""
    if objective.batch_mean != "data_parallel" or batch_group is not None:
        return
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            f"objective {objective.spec} takes the mean of p over the data-parallel ranks: pass "
            "their process group as batch_group, or use cayley(floor=micro_batch)"
        )
