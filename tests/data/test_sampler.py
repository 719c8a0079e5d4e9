"""Every sample once per epoch, and the same stream from any point at any data-parallel size."""

import math
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_deft.data.sampler import FILLER, Stream, full_pass, padded_length, rank_share
from megatron_deft.errors import UserError

SIZES = st.integers(1, 60)
SEEDS = st.integers(0, 2**63)


@given(samples=SIZES, seed=SEEDS, shuffle=st.booleans(), epoch=st.integers(0, 5))
def test_every_sample_once_per_epoch(samples: int, seed: int, shuffle: bool, epoch: int) -> None:
    seen = Stream(samples, seed, shuffle).take(epoch * samples, samples)
    assert seen.dtype == np.int64
    assert sorted(seen.tolist()) == list(range(samples))


@given(samples=SIZES, seed=SEEDS, cuts=st.lists(st.integers(0, 200), max_size=6))
def test_resuming_anywhere_goes_on_with_the_next_sample(
    samples: int, seed: int, cuts: list[int]
) -> None:
    whole = Stream(samples, seed).take(0, 200).tolist()
    points = sorted({0, *cuts, 200})
    parts = [Stream(samples, seed).take(a, b - a).tolist() for a, b in pairwise(points)]
    assert list(chain(*parts)) == whole


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


def test_epochs_differ_and_seeds_differ() -> None:
    stream = Stream(100, 7)
    first, second = stream.take(0, 100).tolist(), stream.take(100, 100).tolist()
    assert first != second
    assert first != Stream(100, 8).take(0, 100).tolist()
    assert first != list(range(100))
    assert Stream(100, 7, shuffle=False).take(95, 10).tolist() == [
        95,
        96,
        97,
        98,
        99,
        0,
        1,
        2,
        3,
        4,
    ]


def test_the_order_is_the_one_of_every_numpy() -> None:
    """Written down: a run resumed after an upgrade must meet the order it began with."""
    assert Stream(8, 1234).take(0, 16).tolist() == ORDER


ORDER = [7, 3, 0, 1, 4, 2, 5, 6, 0, 5, 6, 4, 2, 1, 7, 3]


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "steps"),
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
def test_steps_are_rounded_down(samples: int, batch: int, epochs: float, steps: int) -> None:
    assert Stream(samples, 0).steps(epochs, batch) == steps


def test_less_than_one_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"1 epochs of 10 samples.*train.global_batch below 11"):
        Stream(10, 0).steps(1, 11)


@given(samples=st.integers(1, 40), batch=st.integers(1, 12))
def test_a_full_pass_has_every_sample_once_and_filler_at_the_end(samples: int, batch: int) -> None:
    batches = list(full_pass(samples, batch))
    assert len(batches) == math.ceil(samples / batch)
    assert all(len(indices) == batch for indices in batches)
    flat = np.concatenate(batches).tolist()
    assert flat == list(range(samples)) + [FILLER] * (-samples % batch)


@given(
    lengths=st.lists(st.integers(1, 99), min_size=6, max_size=6),
    multiple=st.integers(1, 16),
    batch=st.lists(st.sampled_from([FILLER, 0, 1, 2, 3, 4, 5]), min_size=1, max_size=8),
)
def test_the_padded_length_is_the_least_multiple_that_holds_all(
    lengths: list[int], multiple: int, batch: list[int]
) -> None:
    length = padded_length(np.array(lengths), np.array(batch), multiple)
    longest = max([lengths[index] for index in batch if index != FILLER], default=1)
    assert length % multiple == 0
    assert longest <= length < longest + multiple
