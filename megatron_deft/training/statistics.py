"""What is logged of a step: sums over exactly the tokens of the loss, then their means."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_deft.loss.metrics import METRICS, metric_sums
from megatron_deft.loss.statistics import TokenStatistics

SUMS = ("objective", "denominator", "kept_tokens", "weight", *METRICS)
HISTOGRAMS = {"gate": 10, "p": 20}  # bins over [0, 1]
LANDSCAPE_BINS = (20, 40)  # of p, and of the entropy as a share of ln(vocabulary)
_STEP_SUMS = len(SUMS) + sum(HISTOGRAMS.values())


def token_sums(
    statistics: TokenStatistics,
    numerator: Tensor,
    denominator: Tensor,
    weights: Tensor,
    landscape_vocab: int | None = None,
) -> Tensor:
    """One micro-batch's sums over its kept tokens: fp64 [sums_size(landscape)].

    The loss's numerator and denominator, the number of kept tokens, the sum of their `weights`
    [b, s]; the sums, each token as often as it weighs, of -log p, p, gate, collision probability,
    entropy and argmax hits; and the histograms of the gate and of p over [0, 1] (the last bin holds
    larger gates too, the first negative ones). With `landscape_vocab`, the vocabulary's size, the
    landscape follows: for each cell of p and entropy / ln(vocabulary) the tokens, and their sum of
    |gate| * (1 - p), which is the gradient on the target's logit.
    """
    keep, gate = statistics.keep, statistics.gate
    head = [numerator.detach().double(), denominator.double(), keep.sum().double()]
    parts = [torch.stack(head), metric_sums(statistics, weights)]
    weights = weights.double().where(keep, 0.0)
    for name, bins in HISTOGRAMS.items():
        parts.append(_binned(_bins(getattr(statistics, name), bins), bins, weights))
    if landscape_vocab is not None:
        p_bins, entropy_bins = LANDSCAPE_BINS
        share = statistics.entropy / math.log(landscape_vocab)
        cells = _bins(statistics.p, p_bins) * entropy_bins + _bins(share, entropy_bins)
        # expm1: 1 - p would be 0 where the model is sure
        gate_error = (gate.double().abs() * -statistics.logp.double().expm1()).where(keep, 0.0)
        for value in (weights, gate_error * weights):
            parts.append(_binned(cells, p_bins * entropy_bins, value))
    return torch.cat(parts)


def _bins(values: Tensor, bins: int) -> Tensor:
    """Which of so many bins over [0, 1] each value is in; nan is in the first."""
    return (values * bins).nan_to_num().clamp(0, bins - 1).long()


def _binned(places: Tensor, bins: int, values: Tensor) -> Tensor:
    return values.new_zeros(bins).index_add(0, places.flatten(), values.flatten())


def head_sums(heads: Sequence[tuple[Tensor, Tensor]], weights: Iterable[Tensor]) -> Tensor:
    """Of each head of multi-token prediction the sum of its losses and of their weights: fp64
    [2 * heads].

    heads: loss and kept tokens of each, [b, s]; weights: of each head's labels, [b, s]
    """
    sums = []
    for (loss, keep), weight in zip(heads, weights, strict=True):
        weight = weight.double().where(keep, 0.0)
        sums += [(loss * weight).sum(), weight.sum()]
    return torch.stack(sums)


def sums_size(landscape: bool, heads: int = 0) -> int:
    """How many numbers `token_sums` and `head_sums` return."""
    return _STEP_SUMS + (2 * math.prod(LANDSCAPE_BINS) if landscape else 0) + 2 * heads


def reduce_sums(
    parts: Iterable[Mapping[str, Any]], size: int, flags: Tensor
) -> tuple[Tensor, Tensor]:
    """The sums of all micro-batches, and of each flag the ranks that raise it, on every rank.

    One all-reduce over the world: what every rank must know of a step costs nothing beside it.

    parts: what the schedule collected, {"sums": token_sums(...), then head_sums(...)} each; empty
        but on the last stage
    size: of those sums
    flags: this rank's, [n], not zero where raised
    """
    total = flags.new_zeros(size, dtype=torch.float64)
    # tensor-parallel ranks saw the same tokens
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        for part in parts:
            total += part["sums"]
    total = torch.cat([total, (flags != 0).double()])
    dist.all_reduce(total)
    sums, raised = total.split([len(total) - len(flags), len(flags)])
    return sums, raised


def means(total: Tensor, heads: int = 0) -> dict[str, float]:
    """Sums -> the metrics of a step: loss, kept_tokens, METRICS, gate_histogram_*, p_histogram_*,
    and mtp_1_loss, ... where there are heads of multi-token prediction.

    METRICS and the histograms, the share of kept tokens per bin, count a token by its weight.
    Without a kept token every mean is nan: a 0 would look like a perfect model.
    """
    numbers = total[:_STEP_SUMS].tolist()
    values = dict(zip(SUMS, numbers, strict=False))
    kept, weight = values["kept_tokens"], values["weight"]
    per_token = 1.0 / weight if weight else math.nan
    loss = values["objective"] / values["denominator"] if weight else math.nan
    metrics = {"loss": loss, "kept_tokens": kept}
    metrics |= {name: values[name] * per_token for name in METRICS}
    counts = iter(numbers[len(SUMS) :])
    for name, bins in HISTOGRAMS.items():
        metrics |= {f"{name}_histogram_{i}": next(counts) * per_token for i in range(bins)}
    for i, (losses, count) in enumerate(total[len(total) - 2 * heads :].view(-1, 2).tolist()):
        metrics[f"mtp_{i + 1}_loss"] = losses / count if count else math.nan
    return metrics


Landscape = dict[str, Any]


def landscape(total: Tensor, vocab_size: int) -> Landscape:
    """Sums with a landscape -> {"vocab_size", "entropy_bins", "tokens", "gate_error"}.

    tokens, gate_error: lists [bin of p][bin of entropy / ln(vocab_size)], weighted counts and sums
    of |gate| * (1 - p); None for a sum that is not finite. Zeros at the end of a row, which are
    most of them, are left out.
    """
    cells = total[_STEP_SUMS : sums_size(landscape=True)]
    tables = cells.view(2, *LANDSCAPE_BINS).tolist()
    tokens, gate_error = ([_short(row) for row in table] for table in tables)
    sizes = {"vocab_size": vocab_size, "entropy_bins": LANDSCAPE_BINS[1]}
    return sizes | {"tokens": tokens, "gate_error": gate_error}


def _short(row: list[float]) -> list[float | None]:
    while row and row[-1] == 0:
        row = row[:-1]
    return [value if math.isfinite(value) else None for value in row]
