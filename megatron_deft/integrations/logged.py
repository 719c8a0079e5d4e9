"""What other people's trainers log of an objective, beside its loss: sums over the kept tokens."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_deft.loss.vocab_parallel import TokenStatistics

LOGGED: Mapping[str, Callable[[TokenStatistics], Tensor]] = {
    "ce": lambda statistics: -statistics.logp,
    "p": lambda statistics: statistics.p,
    "gate": lambda statistics: statistics.gate,
    "collision": lambda statistics: statistics.collision,
    "entropy": lambda statistics: statistics.entropy,
    "accuracy": lambda statistics: statistics.is_argmax,
}
"""Metric -> its value for each token; the names of RUN/metrics.jsonl."""


def logged_sums(statistics: TokenStatistics, weights: Tensor | None = None) -> Tensor:
    """Sums over the kept tokens, fp64 [1 + len(LOGGED)]: of their weights, then of each metric.

    weights: of the statistics' shape, what each token counts for. None: all count for 1
    A metric's mean is its sum divided by the first one, whoever has added what up before.
    """
    keep = statistics.keep
    ones = keep.double() if weights is None else weights.double().where(keep, 0.0)
    # where, not a product alone: what is not kept may be inf
    values = (value(statistics).double().where(keep, 0.0) * ones for value in LOGGED.values())
    return torch.stack([ones.sum(), *(value.sum() for value in values)])
