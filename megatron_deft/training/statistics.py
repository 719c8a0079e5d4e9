"""What is logged of a step: sums over exactly the tokens of the loss, then their means."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft.loss.vocab_parallel import TokenStatistics

GATE_BINS = 10
MEANS = ("ce", "p", "gate", "collision", "entropy", "accuracy")
SUMS = ("objective", "denominator", "kept_tokens", "weight", *MEANS)


def token_sums(
    statistics: TokenStatistics, numerator: Tensor, denominator: Tensor, weights: Tensor
) -> Tensor:
    """One micro-batch's sums over its kept tokens: fp64 [len(SUMS) + GATE_BINS].

    The loss's numerator and denominator, the number of kept tokens, the sum of their `weights`
    [b, s]; the sums, each token as often as it weighs, of -log p, p, gate, collision probability,
    entropy and argmax hits, and the histogram of the gate over [0, 1] (the last bin holds larger
    gates too, the first negative ones).
    """
    keep, gate = statistics.keep, statistics.gate
    weights = weights.double().where(keep, 0.0)
    per_token = (
        -statistics.logp,
        statistics.p,
        gate,
        statistics.collision,
        statistics.entropy,
        statistics.is_argmax,
    )
    # where, not a product alone: what is not kept may be inf
    means = [(value.double().where(keep, 0.0) * weights).sum() for value in per_token]
    bins = (gate * GATE_BINS).nan_to_num().clamp(0, GATE_BINS - 1).long()
    histogram = weights.new_zeros(GATE_BINS).index_add(0, bins.flatten(), weights.flatten())
    head = [numerator.detach().double(), denominator.double(), keep.sum().double(), weights.sum()]
    return torch.cat([torch.stack([*head, *means]), histogram])


def reduce_sums(parts: Iterable[Mapping[str, Any]], device: torch.device) -> Tensor:
    """The sums of all micro-batches of all ranks, on every rank.

    parts: what the schedule collected, {"sums": token_sums(...)} each; empty but on the last stage.
    """
    from megatron.core import parallel_state

    total = torch.zeros(len(SUMS) + GATE_BINS, dtype=torch.float64, device=device)
    for part in parts:
        total += part["sums"]
    # data- and context-parallel ranks saw different tokens; tensor-parallel ones the same
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    # only the last stage has a loss, and every rank must take the same decisions
    dist.broadcast(
        total,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return total


def means(total: Tensor) -> dict[str, float]:
    """Sums -> the metrics of a step: loss, kept_tokens, MEANS, and gate_histogram_0 to _9.

    MEANS and the histogram, the share of kept tokens per bin, count a token by its weight. Without
    a kept token every mean is nan: a 0 would look like a perfect model.
    """
    values = dict(zip(SUMS, total[: len(SUMS)].tolist(), strict=True))
    kept, weight = values["kept_tokens"], values["weight"]
    per_token = 1.0 / weight if weight else math.nan
    loss = values["objective"] / values["denominator"] if weight else math.nan
    metrics = {"loss": loss, "kept_tokens": kept}
    metrics |= {name: values[name] * per_token for name in MEANS}
    for index, count in enumerate(total[len(SUMS) :].tolist()):
        metrics[f"gate_histogram_{index}"] = count * per_token
    return metrics
