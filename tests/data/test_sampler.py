"""Every sample once per epoch, and the same stream from any point at any data-parallel size."""

import math
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_deft.data.sampler import (
    BLEND_PERIOD,
    FILLER,
    Blend,
    Stream,
    epochs,
    full_pass,
    rank_share,
    steps,
)
from megatron_deft.errors import UserError

SIZES = st.sampled_from([2, 7, 30, 60, 100])
SEEDS = st.integers(0, 2**63)


@settings(max_examples=10)
@given(samples=SIZES, seed=SEEDS, shuffle=st.booleans(), epoch=st.integers(0, 5))
def test_every_sample_once_per_epoch(samples: int, seed: int, shuffle: bool, epoch: int) -> None:
    seen = Stream(samples, seed, shuffle).take(epoch * samples, samples)
    assert seen.dtype == np.int64
    assert sorted(seen.tolist()) == list(range(samples))


@settings(max_examples=10)
@given(samples=SIZES, seed=SEEDS, cuts=st.lists(st.integers(0, 200), max_size=6))
def test_resuming_anywhere_goes_on_with_the_next_sample(
    samples: int, seed: int, cuts: list[int]
) -> None:
    whole = Stream(samples, seed).take(0, 200).tolist()
    points = sorted({0, *cuts, 200})
    parts = [Stream(samples, seed).take(a, b - a).tolist() for a, b in pairwise(points)]
    assert list(chain(*parts)) == whole


@settings(max_examples=10)
@given(
    samples=SIZES,
    seed=SEEDS,
    micro=st.integers(1, 3),
    sizes=st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([1, 2, 3, 4, 6])),
    consumed=st.integers(0, 500),
)
def test_any_data_parallel_size_sees_the_same_micro_batches(
    samples: int, seed: int, micro: int, sizes: tuple[int, int], consumed: int
) -> None:
    batch = Stream(samples, seed).take(consumed, 12 * micro)
    by_size = []
    for size in sizes:
        shares = [rank_share(batch, rank, size, micro) for rank in range(size)]
        assert all(share.shape == (12 // size, micro) for share in shares)
        by_size.append(sorted(row.tolist() for share in shares for row in share))
        # in turn: the first micro-batches of all ranks, in rank order, open the global batch
        assert (
            np.concatenate([share[0] for share in shares]).tolist()
            == batch[: size * micro].tolist()
        )
    assert by_size[0] == by_size[1]


def test_one_row_is_all_there_is() -> None:
    assert Stream(1, 9).take(5, 3).tolist() == [0, 0, 0]


def test_epochs_differ_and_seeds_differ() -> None:
    stream = Stream(100, 7)
    first, second = stream.take(0, 100).tolist(), stream.take(100, 100).tolist()
    assert first != second
    assert first != Stream(100, 8).take(0, 100).tolist()
    assert first != list(range(100))
    unshuffled = Stream(100, 7, shuffle=False).take(95, 10).tolist()
    assert unshuffled == [95, 96, 97, 98, 99, 0, 1, 2, 3, 4]


def test_every_order_is_as_likely_as_any_other() -> None:
    """Pearson's chi-square over the 24 orders of 4 rows; 49.7 is exceeded once in a thousand."""
    counts = Counter(tuple(Stream(4, seed).take(0, 4).tolist()) for seed in range(1200))
    assert len(counts) == 24
    assert sum((count - 50) ** 2 / 50 for count in counts.values()) < 49.7


def test_neighbours_do_not_stay_together() -> None:
    rows = Stream(100_000, 3).take(0, 100_000)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(rows, np.arange(100_000))[0, 1]) < 0.02
    assert (np.abs(np.diff(rows)) == 1).mean() < 1e-3


def test_a_stream_is_as_quick_and_small_however_many_rows_there_are() -> None:
    """Ten billion rows: nothing of that length can have been made."""
    size = 10**10
    rows = Stream(size, 5).take(7 * size - 300, 600)
    assert len(set(rows.tolist())) == 600
    assert (rows < size).all()
    assert rows.max() > size / 2


def test_the_order_is_the_one_of_every_numpy() -> None:
    """Written down: a run resumed after an upgrade must meet the order it began with."""
    assert Stream(8, 1234).take(0, 16).tolist() == ORDER


ORDER = [3, 7, 5, 2, 1, 6, 0, 4, 6, 4, 5, 7, 3, 0, 1, 2]


@pytest.mark.parametrize(
    ("samples", "batch", "passes", "expected"),
    [
        (40_000, 256, 1, 156),  # the released FigFont run ends at step 156
        (40_000, 256, 2, 312),
        (10, 3, 1, 3),
        (10, 3, 3, 10),  # batches run across epochs: 30 samples, not 3 * 3 steps
        (100, 29, 0.29, 1),
        (100, 100, 1.5, 1),
        (9, 3, 1 / 3, 1),
    ],
)
def test_steps_are_rounded_down(samples: int, batch: int, passes: float, expected: int) -> None:
    assert steps(Stream(samples, 0), passes, batch) == expected


def test_less_than_one_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"1 epochs of 10 samples.*train.global_batch below 11"):
        steps(Stream(10, 0), 1, 11)


@settings(max_examples=10)
@given(samples=st.integers(1, 40), batch=st.integers(1, 12))
def test_a_full_pass_has_every_sample_once_and_filler_at_the_end(samples: int, batch: int) -> None:
    batches = list(full_pass(samples, batch))
    assert len(batches) == math.ceil(samples / batch)
    assert all(len(indices) == batch for indices in batches)
    flat = np.concatenate(batches).tolist()
    assert flat == list(range(samples)) + [FILLER] * (-samples % batch)


def test_a_blend_keeps_its_shares_at_every_moment() -> None:
    blend = Blend((Stream(10, 1), Stream(1000, 2), Stream(7, 3)), (5.0, 3.0, 2.0))
    rows = blend.take(0, 3000)
    for number, (begin, end, share) in enumerate(
        [(0, 10, 0.5), (10, 1010, 0.3), (1010, 1017, 0.2)]
    ):
        own = (rows >= begin) & (rows < end)
        drift = np.cumsum(own) - share * np.arange(1, 3001)
        assert np.abs(drift).max() < 2, number
        stream = blend.streams[number]
        # each set goes through its own epochs, none of its rows missed
        assert rows[own].tolist() == (begin + stream.take(0, own.sum())).tolist()
    assert epochs(blend, 1017) == 1


@settings(max_examples=10)
@given(consumed=st.integers(0, 3 * BLEND_PERIOD), count=st.integers(0, 50))
def test_a_blend_is_the_same_from_any_point(consumed: int, count: int) -> None:
    blend = Blend((Stream(3, 1), Stream(5, 2)), (0.9, 0.1))
    ahead = blend.take(max(0, consumed - 20), count + 20)[min(consumed, 20) :]
    assert blend.take(consumed, count).tolist() == ahead[:count].tolist()


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, math.nan), (1.0, 1e-9)])
def test_weights_that_are_no_shares_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"data.train_weights="):
        Blend((Stream(3, 1), Stream(5, 2)), weights)
