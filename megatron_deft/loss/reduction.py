"""From per-token losses to the mean that a training step minimises."""

import torch
from torch import Tensor

from megatron_deft.errors import UserError


def reduce_loss(loss: Tensor, keep: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of a mean that stays right when both are summed over ranks.

    loss, keep: [batch, tokens] as `token_loss` and its statistics give them
    reduction:  "token"        sum over kept tokens / their number
                "micro_batch"  mean over this batch's kept tokens / 1
                "sample"       sum over samples of the mean of each / samples with a kept token
    returns:    scalar fp32 numerator (differentiable) and int64 denominator. The objective value of
                a step is the sum of numerators over micro-batches and data- and context-parallel
                ranks, divided by the sum of denominators. A batch without a kept token gives 0 and,
                except for "micro_batch", 0.
    """
    if reduction == "token":
        return loss.sum(), keep.sum()
    if reduction == "micro_batch":
        return loss.sum() / keep.sum().clamp(min=1), keep.new_ones((), dtype=torch.int64)
    if reduction == "sample":
        kept = keep.sum(-1)
        return (loss.sum(-1) / kept.clamp(min=1)).sum(), (kept > 0).sum()
    raise UserError(f"reduction={reduction}: legal are token, micro_batch, sample")
