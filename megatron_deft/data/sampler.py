"""Which rows each step and each rank sees: a pure function of the seed and of what was consumed.

A row is a sample, or a pack of them. The run is one endless stream: the rows of epoch 0 in an order
of its own, then those of epoch 1, and so on; with several sets and weights, one such stream each,
taken from in turn. Global batch k is stream[k B : (k + 1) B], so a batch may hold the end of one
epoch and the beginning of the next, and no row is left out of an epoch (there is no `drop_last`:
only the rows after the run's last whole batch are not seen). `consumed` (rows, not steps) is the
only state to save: resuming at any data-parallel size, or with another global batch, goes on with
the very next row. Nothing here communicates, and nothing is as long as the data: any rank computes
any part of the stream by itself, at once, whether there are ten rows or ten billion.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_deft.errors import UserError

FILLER = -1  # the index of no row, where a validation pass does not divide evenly
BLEND_PERIOD = 2**16  # a blend's order repeats after so many rows; shares are multiples of 2**-16

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """The endless stream of `num_rows` rows, epoch after epoch; shuffled by `seed`."""

    num_rows: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        assert self.num_rows > 0, "a stream needs at least one row"

    def take(self, consumed: int, count: int) -> Indices:
        """The `count` rows that follow the first `consumed`: int64 [count]."""
        return self.at(np.arange(consumed, consumed + count))

    def at(self, positions: Indices) -> Indices:
        """The rows at any places of the stream: int64, as many as `positions`."""
        epochs, places = np.divmod(positions, self.num_rows)
        if not self.shuffle:
            return places
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = _shuffled(places[here], self.num_rows, self.seed, int(epoch))
        return rows


@dataclass(frozen=True)
class Blend:
    """Several streams, each taken from in proportion to its weight, as evenly as can be.

    Rows are numbered through: those of the second stream follow those of the first. Within a period
    (BLEND_PERIOD rows) what was taken of a stream is its share to within one row per stream. That
    share is its weight's to the nearest of 2^16, and so it stays however far the run is: of three
    equal streams one has 1 row more than the others in every 65,536.
    A stream that is short of rows begins its next epoch.
    """

    streams: tuple[Stream, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Errors: UserError for weights that are no shares."""
        weights = self.weights
        if len(weights) != len(self.streams) or not all(0 < w < math.inf for w in weights):
            raise UserError(
                f"data.train_weights={list(weights)}: expected {len(self.streams)} numbers above "
                "0, one for each of data.train_sets"
            )
        if min(self._counts()) == 0:
            raise UserError(
                f"data.train_weights={list(weights)}: the smallest is less than 1 in "
                f"{2 * BLEND_PERIOD} of the whole: leave that set out"
            )

    def take(self, consumed: int, count: int) -> Indices:
        """The `count` rows that follow the first `consumed`: int64 [count]."""
        counts, order, before = self._pattern
        periods, places = np.divmod(np.arange(consumed, consumed + count), BLEND_PERIOD)
        sources = order[places]
        firsts = np.cumsum([0, *(stream.num_rows for stream in self.streams)])
        rows = np.empty(count, np.int64)
        for number, stream in enumerate(self.streams):
            here = sources == number
            position = periods[here] * counts[number] + before[places[here]]
            rows[here] = firsts[number] + stream.at(position)
        return rows

    @property
    def num_rows(self) -> int:
        """Rows of all streams together: what a blend calls an epoch."""
        return sum(stream.num_rows for stream in self.streams)

    def _counts(self) -> Indices:
        """Rows of each stream in a period: BLEND_PERIOD shared out by largest remainders."""
        exact = np.array(self.weights) / sum(self.weights) * BLEND_PERIOD
        counts = np.floor(exact).astype(np.int64)
        rest = BLEND_PERIOD - counts.sum()
        counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
        return counts

    @cached_property
    def _pattern(self) -> tuple[Indices, Indices, Indices]:
        """Of one period: each stream's rows, the stream of each place, and its rows before it."""
        counts = self._counts()
        # Stream s has its n-th row when (n + 1/2) / count of the period is over.
        times = [(np.arange(count) + 0.5) / count for count in counts]
        order = np.argsort(np.concatenate(times), kind="stable")
        source = np.repeat(np.arange(len(counts)), counts)
        before = np.concatenate([np.arange(count) for count in counts])
        return counts, source[order], before[order]


def epochs(stream: Stream | Blend, consumed: int) -> float:
    """How many passes over the rows `consumed` is."""
    return consumed / stream.num_rows


def steps(stream: Stream | Blend, epochs: float, global_batch: int) -> int:
    """Whole global batches within `epochs` passes (a fraction is fine): rounded down.

    Rounded down as the released trainers do (40,000 samples in batches of 256 are 156 steps, not
    157), so the last `epochs * num_rows mod global_batch` rows are the only ones not seen.
    Errors: UserError when that is no step at all.
    """
    # The tolerance: 0.29 epochs of 100 rows are 29 of them, though 0.29 * 100 < 29.
    whole = math.floor(epochs * stream.num_rows / global_batch + 1e-9)
    if whole < 1:
        raise UserError(
            f"{epochs:g} epochs of {stream.num_rows} samples are less than one global batch: "
            f"set train.global_batch below {global_batch}, or more train.epochs"
        )
    return whole


def rank_share(batch: Indices, rank: int, size: int, micro_batch: int) -> Indices:
    """Data-parallel rank `rank`'s part of a global batch: int64 [micro-batches, micro_batch].

    The batch is cut into micro-batches of consecutive rows, dealt to the `size` ranks in turn,
    so that which rows share a micro-batch does not depend on `size`.
    """
    share = size * micro_batch
    assert 0 <= rank < size, f"rank {rank} of {size}"
    assert len(batch) % share == 0, f"{len(batch)} rows on {size} ranks of {micro_batch} each"
    return batch.reshape(-1, size, micro_batch)[:, rank]


def full_pass(num_rows: int, global_batch: int) -> Iterator[Indices]:
    """Every row once, in order, in batches of `global_batch`; FILLER completes the last one."""
    for start in range(0, num_rows, global_batch):
        batch = np.arange(start, start + global_batch)
        yield np.where(batch < num_rows, batch, FILLER)


def _shuffled(places: Indices, size: int, seed: int, epoch: int) -> Indices:
    """What stands at `places` of the numbers below `size`, in the order of `seed` and `epoch`.

    A Feistel network of eight rounds permutes the numbers of the next even number of bits; a result
    of `size` or more is permuted again, until it is below (on average fewer than four times).
    Rejected: an array of the whole order, 8 bytes a row on every rank and seconds of sorting at
    every epoch's first batch; numpy's Generator, whose numbers may change between versions, so that
    a run resumed after an upgrade would see some rows twice and others never (Philox's may not).
    """
    half = max(3, -(-max(size - 1, 1).bit_length() // 2))
    keys = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(8)
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    values = places.astype(np.uint64)
    left = np.flatnonzero(values >= 0)
    while len(left):
        high, low = values[left] >> shift, values[left] & mask
        for key in keys:
            high, low = low, high ^ (_mixed(low + key) & mask)
        values[left] = high << shift | low
        left = left[values[left] >= size]
    return values.astype(np.int64)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each number's bits, each dependent on all (the finalizer of splitmix64)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
