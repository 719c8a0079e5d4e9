"""Means with 95% intervals, and pass@k: numpy alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np

_Z = 1.959964  # 95% of a normal distribution lies within as many standard deviations
_RESAMPLES = 2000
_RESAMPLES_AT_ONCE = 100  # bounds the memory: as many times 8 bytes per question


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float


def wilson(values: Sequence[float]) -> Interval:
    """The share of ones among zeros and ones; Wilson's interval, which has a width at 0 and 1 too.

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    count, mean = len(values), sum(values) / len(values)
    scale = 1 + _Z**2 / count
    centre = (mean + _Z**2 / (2 * count)) / scale
    half = _Z * sqrt(mean * (1 - mean) / count + _Z**2 / (4 * count**2)) / scale
    return Interval(mean, min(mean, centre - half), max(mean, centre + half))


def bootstrap(*sets: Sequence[float], seed: int = 0) -> Interval:
    """The mean of the sets' means, and the middle 95% of those of 2000 resamples of every set.

    Each set counts the same, however many questions it has. Equal values give equal bounds. For two
    models on the same questions, pass the differences: they are resampled as pairs.
    """
    generator = np.random.default_rng(seed)
    means = np.zeros(_RESAMPLES)
    for values in sets:
        array = np.asarray(values, float)
        for start in range(0, _RESAMPLES, _RESAMPLES_AT_ONCE):
            drawn = generator.integers(len(array), size=(_RESAMPLES_AT_ONCE, len(array)))
            means[start : start + _RESAMPLES_AT_ONCE] += array[drawn].mean(1) / len(sets)
    low, high = np.quantile(means, [0.025, 0.975])
    mean = float(np.mean([np.mean(values) for values in sets]))
    return Interval(mean, float(low), float(high))


def pass_at_k(right: int, count: int, k: int) -> float:
    """The chance that one of k answers is right, of `count` of which `right` are; unbiased.

    Source: Chen et al. (2021), Evaluating large language models trained on code, eq. 1.
    """
    return 1.0 - comb(count - right, k) / comb(count, k)
