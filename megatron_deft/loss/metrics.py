"""What is logged of an objective beside its loss, by every trainer: sums over the kept tokens."""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft.loss.vocab_parallel import TokenStatistics

METRICS: Mapping[str, Callable[[TokenStatistics], Tensor]] = {
    "ce": lambda statistics: -statistics.logp,
    "p": lambda statistics: statistics.p,
    "gate": lambda statistics: statistics.gate,
    "collision": lambda statistics: statistics.collision,
    "entropy": lambda statistics: statistics.entropy,
    "accuracy": lambda statistics: statistics.is_argmax,
}
"""Metric -> its value for each token; the names of RUN/metrics.jsonl."""


def metric_sums(statistics: TokenStatistics, weights: Tensor | None = None) -> Tensor:
    """Sums over the kept tokens, fp64 [1 + len(METRICS)]: of their weights, then of each metric.

    weights: of the statistics' shape, what each token counts for. None: all count for 1
    A metric's mean is its sum divided by the first one, whoever has added what up before.
    """
    keep = statistics.keep
    ones = keep.double() if weights is None else weights.double().where(keep, 0.0)
    # where, not a product alone: what is not kept may be inf
    values = (value(statistics).double().where(keep, 0.0) * ones for value in METRICS.values())
    return torch.stack([ones.sum(), *(value.sum() for value in values)])


def sum_over_ranks(sums: Tensor) -> Tensor:
    """Add up what the ranks of a megatron-core layout have seen, in place, on every rank.

    sums: on the last pipeline stage, of this rank's tokens; on the others whatever, of that shape.
    """
    from megatron.core import parallel_state

    # data- and context-parallel ranks saw different tokens; tensor-parallel ones the same
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    # only the last stage has a loss, and every rank must take the same decisions
    dist.broadcast(
        sums,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return sums
