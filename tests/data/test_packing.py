"""Packs against a loop that puts one sample after another where best fit says."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_deft.data.packing import Packs, pack
from megatron_deft.errors import UserError


def naive(lengths: list[int], capacity: int) -> Counter[tuple[int, ...]]:
    """Each pack's lengths, as a loop over samples makes them; the first of equally full packs."""
    packs: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        room = [capacity - sum(p) for p in packs]
        fitting = [i for i, r in enumerate(room) if r >= length]
        if fitting:
            packs[min(fitting, key=lambda i: room[i])].append(length)
        else:
            packs.append([length])
    return Counter(map(tuple, packs))


def contents(packs: Packs, lengths: np.ndarray) -> Counter[tuple[int, ...]]:
    return Counter(tuple(lengths[packs[p]].tolist()) for p in range(len(packs)))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 40))
    longest = draw(st.integers(1, capacity))
    return draw(st.lists(st.integers(1, longest), max_size=120)), capacity


@given(problems(), st.integers(0, 2**63))
@settings(max_examples=400, deadline=None)
def test_packs_are_best_fit_decreasing(problem: tuple[list[int], int], seed: int) -> None:
    lengths, capacity = np.array(problem[0], np.int64), problem[1]
    packs = pack(lengths, capacity, seed)
    assert contents(packs, lengths) == naive(*problem)
    assert sorted(packs.samples) == list(range(len(lengths)))
    assert packs.fill.tolist() == [lengths[packs[p]].sum() for p in range(len(packs))]
    assert (packs.fill <= capacity).all()
    if len(packs):
        assert packs.efficiency == lengths.sum() / (len(packs) * capacity)


def test_many_packs_of_many_lengths() -> None:
    """Enough that groups of packs are filled whole, merged and grown."""
    lengths = np.random.default_rng(0).geometric(0.02, 6000).clip(1, 100)
    assert contents(pack(lengths, 100, 0), lengths) == naive(lengths.tolist(), 100)
    few = np.random.default_rng(1).choice([3, 7, 50, 51], 6000)
    assert contents(pack(few, 101, 0), few) == naive(few.tolist(), 101)


def test_equal_lengths_are_dealt_by_seed() -> None:
    lengths = np.full(1000, 10)
    first, again, other = (pack(lengths, 100, seed) for seed in (3, 3, 4))
    assert first.samples.tolist() == again.samples.tolist() != other.samples.tolist()
    neighbours = np.abs(np.diff(first.samples.reshape(-1, 10), axis=1)) == 1
    assert neighbours.mean() < 0.02
    # The order is part of the format of a run: a resumed one must see it again.
    assert pack(np.ones(8, np.int64), 8, 5).samples.tolist() == FIXED


FIXED = [2, 4, 3, 1, 5, 0, 6, 7]


def test_a_million_typical_lengths_pack_tightly() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 0.9, 1_000_000).astype(np.int64).clip(1, 2048)
    packs = pack(lengths.astype(np.int32), 2048, 0)
    assert packs.efficiency > 0.999
    assert packs.offsets.dtype == packs.samples.dtype == packs.fill.dtype == np.int64


def test_nothing_to_pack() -> None:
    packs = pack(np.zeros(0, np.int64), 8, 0)
    assert (len(packs), packs.offsets.tolist(), packs.efficiency) == (0, [0], 0.0)
    with pytest.raises(IndexError):
        packs[0]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([3, 9, 10], "sample 1 takes 9 positions, more than the 8"), ([3, 0], "sample 1 takes 0")],
)
def test_what_does_not_fit_is_named(lengths: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        pack(np.array(lengths), 8, 0)
    assert "\n" not in str(error.value)
