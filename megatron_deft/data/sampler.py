"""Which samples each step and each rank sees: a pure function of the seed and of what was consumed.

The run is one endless stream: the samples of epoch 0 in an order of its own, then those of epoch 1,
and so on. Global batch k is stream[k B : (k + 1) B], so a batch may hold the end of one epoch and
the beginning of the next and no sample is left out of an epoch. `consumed` (samples, not steps) is
the only state to save: resuming at any data-parallel size, or with another global batch, goes on
with the very next sample. Nothing here communicates; every rank computes the same answer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_deft.errors import UserError

FILLER = -1  # the index of no sample, where a validation pass does not divide evenly

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Stream:
    """The endless stream of `num_samples` samples, epoch after epoch; shuffled by `seed`."""

    num_samples: int
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        assert self.num_samples > 0, "a stream needs at least one sample"

    def take(self, consumed: int, count: int) -> Indices:
        """The `count` samples that follow the first `consumed`: int64 [count]."""
        pieces = []
        while count > 0:
            epoch, start = divmod(consumed, self.num_samples)
            piece = self._epoch(epoch)[start : start + count]
            pieces.append(piece)
            consumed, count = consumed + len(piece), count - len(piece)
        return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)

    def epochs(self, consumed: int) -> float:
        """How many passes over the samples `consumed` is."""
        return consumed / self.num_samples

    def steps(self, epochs: float, global_batch: int) -> int:
        """Whole global batches within `epochs` passes (a fraction is fine): rounded down.

        Rounded down as the released trainers do (40,000 samples in batches of 256 are 156 steps,
        not 157), so the last `epochs * num_samples mod global_batch` samples are the only ones not
        seen. Errors: UserError when that is no step at all.
        """
        # The tolerance: 0.29 epochs of 100 samples are 29 of them, though 0.29 * 100 < 29.
        steps = math.floor(epochs * self.num_samples / global_batch + 1e-9)
        if steps < 1:
            raise UserError(
                f"{epochs:g} epochs of {self.num_samples} samples are less than one global batch: "
                f"set train.global_batch below {global_batch}, or more train.epochs"
            )
        return steps

    def _epoch(self, epoch: int) -> Indices:
        if not self.shuffle:
            return np.arange(self.num_samples)
        return _shuffled(self.num_samples, self.seed, epoch)


def rank_share(batch: Indices, rank: int, size: int, micro_batch: int) -> Indices:
    """Data-parallel rank `rank`'s part of a global batch: int64 [micro-batches, micro_batch].

    The batch is cut into micro-batches of consecutive samples, dealt to the `size` ranks in turn,
    so that which samples share a micro-batch does not depend on `size`.
    """
    share = size * micro_batch
    assert 0 <= rank < size, f"rank {rank} of {size}"
    assert len(batch) % share == 0, f"{len(batch)} samples on {size} ranks of {micro_batch} each"
    return batch.reshape(-1, size, micro_batch)[:, rank]


def full_pass(num_samples: int, global_batch: int) -> Iterator[Indices]:
    """Every sample once, in order, in batches of `global_batch`; FILLER completes the last one."""
    for start in range(0, num_samples, global_batch):
        batch = np.arange(start, start + global_batch)
        yield np.where(batch < num_samples, batch, FILLER)


def padded_length(lengths: Indices, batch: Indices, multiple: int = 1) -> int:
    """The longest sample of a global batch, rounded up to a multiple: its every row's length.

    One length for the whole batch: pipeline stages and sequence shards need it to agree, and every
    rank knows it without asking, since it knows all `lengths` (int64 [N]) and the whole `batch`.
    """
    longest = int(lengths[batch[batch != FILLER]].max(initial=1))
    return -(-longest // multiple) * multiple


@lru_cache(maxsize=2)  # the epoch at hand, and the next where a batch spans both
def _shuffled(num_samples: int, seed: int, epoch: int) -> Indices:
    # Sorting raw Philox output, because numpy promises never to change that stream. Rejected:
    # Generator.permutation, whose order numpy may change between versions, so that a run resumed
    # after an upgrade would see some samples twice and others never.
    key = np.array([seed % 2**64, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(num_samples), kind="stable")
    order.flags.writeable = False
    return order
