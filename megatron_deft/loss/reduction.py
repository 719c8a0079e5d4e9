"""From per-token losses to the mean that a training step minimises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("token", "micro_batch", "sample")


def reduce_loss(
    loss: Tensor,
    keep: Tensor,
    reduction: str,
    *,
    weights: Tensor | None = None,
    documents: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of a mean that stays right when both are summed over ranks.

    loss, keep: [batch, tokens] as `token_loss` and its statistics give them
    reduction:  "token"        sum over kept tokens / their number
                "micro_batch"  mean over this batch's kept tokens / 1
                "sample"       sum over samples of the mean of each / samples with a kept token
    weights:    [batch, tokens] fp32, what each token counts for: one of weight 2 counts as two
                tokens would. None: all count for 1
    documents:  [batch, tokens] int64, the number (from 0, below batch * tokens) of the sample that
                a token belongs to, where samples are packed. None: each row is one
    group:      the ranks that share the tokens of every sample (context parallel). None: nobody
    returns:    scalar fp32 numerator (differentiable) and denominator, int64, or fp64 with weights
                or a group. The objective value of a step is the sum of numerators over
                micro-batches and data- and context-parallel ranks, divided by the sum of
                denominators. A batch without a kept token gives 0 and, except for "micro_batch", 0.
    """
    if reduction not in REDUCTIONS:
        raise UserError(f"reduction={reduction}: legal are {', '.join(REDUCTIONS)}")
    counts = keep.long()
    if weights is not None:
        loss, counts = loss * weights, counts * weights.double()
    if reduction == "token":
        return loss.sum(), counts.sum()
    if reduction == "micro_batch":
        losses, counts = loss.sum(), counts.sum()
    elif documents is None:
        losses, counts = loss.sum(-1), counts.sum(-1)
    else:
        losses, counts = (_sums(values, documents) for values in (loss, counts))
    if group is not None:
        # a sample's mean divides by its tokens on all ranks that share it
        dist.all_reduce(counts, group=group)
    means = losses / counts.where(counts > 0, 1)
    samples = (counts > 0).sum() if reduction == "sample" else counts.new_ones((), dtype=torch.long)
    # every rank of the group counts the same samples: each adds its part
    return means.sum().float(), samples if group is None else samples.double() / group.size()


def _sums(values: Tensor, documents: Tensor) -> Tensor:
    """The sum of each document's values: [batch * tokens], 0 where there is no such document."""
    # As long as there could be documents: asking how many there are would stop a CUDA stream.
    return values.new_zeros(values.numel()).index_add(0, documents.flatten(), values.flatten())
