"""Rows of several sets, packed or not, and the part of each step that a rank computes."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from megatron_deft.data.indexed import Block, TokenSet, write_set
from megatron_deft.data.loader import Share, Step, load_steps
from megatron_deft.data.mixture import SampleRows
from megatron_deft.data.sampler import FILLER
from megatron_deft.data.samples import IGNORE, Encoded
from megatron_deft.errors import UserError

LENGTHS = ([5, 9, 3, 17, 8, 2], [12, 4, 4, 30])
ALONE = Share(
    rank=0, size=1, micro_batch=2, context_rank=0, context_size=1, multiple=1, packed=False
)


@pytest.fixture
def sets(tmp_path: Path) -> list[TokenSet]:
    """Token t of sample s of set n is 1000 n + 100 s + t; the first two tokens are a prompt."""
    opened = []
    for number, lengths in enumerate(LENGTHS):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokens = [1000 * number + 100 * s + np.arange(n) for s, n in enumerate(lengths)]
        weights = [np.arange(n) > 1 for n in lengths]
        block = Block(np.array(lengths, np.int32), np.concatenate(tokens), np.concatenate(weights))
        about = {"kind": "sft", "tokenizer": {"hash": "", "name": ""}, "template": None}
        write_set(folder, [block], ("int32", "uint8"), about)
        opened.append(TokenSet(folder))
    return opened


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("context", [1, 2])
def test_every_sample_is_in_one_row(sets: list[TokenSet], packed: bool, context: int) -> None:
    rows = SampleRows(sets, 32, packed, context, seed=3)
    count = sum(rows.sizes)
    assert (count < 10) is packed
    documents = [rows.documents(row) for row in range(count)]
    firsts = sorted(int(one.tokens[0]) for row in documents for one in row)
    assert firsts == sorted(
        1000 * n + 100 * s for n, ls in enumerate(LENGTHS) for s in range(len(ls))
    )
    for row, own in enumerate(documents):
        assert len({one.tokens[0] // 1000 for one in own}) == 1, "packs hold samples of one set"
        used = sum(-(-(len(one.tokens) - 1) // (2 * context)) * 2 * context if context > 1
                   else len(one.tokens) - 1 for one in own)  # fmt: skip
        assert rows.positions(np.array([row])).tolist() == [used]
        assert used <= 32


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("limit", [3, 6, 8, 10, 99])
def test_the_first_samples_are_those_of_the_sets_packed_or_not(
    sets: list[TokenSet], packed: bool, limit: int
) -> None:
    """And not the first packs, which hold the longest samples."""
    rows = SampleRows(sets, 32, packed, 1, seed=3, limit=limit)
    found = [one for row in range(sum(rows.sizes)) for one in rows.documents(row)]
    names = [1000 * n + 100 * s for n, lengths in enumerate(LENGTHS) for s in range(len(lengths))]
    assert sorted(int(one.tokens[0]) for one in found) == names[:limit]
    assert sum("are used" in line for line in rows.describe()) == (limit < 10) + (limit < 6)


def test_the_fingerprint_is_of_what_rows_depend_on(sets: list[TokenSet]) -> None:
    same = SampleRows(sets, 32, True, 1, seed=3).fingerprint
    assert SampleRows(sets, 32, True, 1, seed=3).fingerprint == same
    changed = [
        SampleRows(sets[::-1], 32, True, 1, seed=3),
        SampleRows(sets, 64, True, 1, seed=3),
        SampleRows(sets, 32, False, 1, seed=3),
        SampleRows(sets, 32, True, 2, seed=3),
        SampleRows(sets, 32, True, 1, seed=4),
    ]
    assert len({same, *(rows.fingerprint for rows in changed)}) == 6
    # without packs neither seed nor length matters
    plain = [SampleRows(sets, length, False, 1, seed) for length, seed in ((32, 1), (64, 2))]
    assert plain[0].fingerprint == plain[1].fingerprint


def trained(step: Step) -> list[int]:
    return sorted(
        int(label)
        for batch in step.batches
        for label in batch["labels"].flatten()
        if label != IGNORE
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_a_batch_of_one_length(sets: list[TokenSet], workers: int) -> None:
    rows = SampleRows(sets, 32, False, 1, seed=0)
    context = SampleRows(sets, 32, False, 2, seed=0)  # whose positions are padded to multiples of 4
    batches = [np.array([9, 0, 3, 1]), np.array([2, 5, 7, FILLER])]
    ranks = []
    for rank in range(2):
        share = Share(rank, 2, 1, 0, 1, multiple=3, packed=False)
        ranks.append(list(load_steps(rows, share, batches, workers)))
    for number, (batch, steps) in enumerate(zip(batches, zip(*ranks, strict=True), strict=True)):
        real = [rows.documents(int(row))[0] for row in batch if row != FILLER]
        assert {step.length for step in steps} == {48 if number == 0 else 24}  # multiples of 8 x 3
        count = sum(len(one.tokens) - 1 for one in real)
        assert {step.tokens for step in steps} == {count}
        cut = Share(0, 2, 1, 0, 2, multiple=3, packed=False)
        assert next(load_steps(context, cut, [batch], workers)).tokens == count
        assert sorted(trained(steps[0]) + trained(steps[1])) == sorted(
            int(token) for one in real for token in one.tokens[2:]
        )


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_that_a_reader_meets_is_one_line(sets: list[TokenSet], workers: int) -> None:
    (sets[0].path / "tokens.bin").write_bytes(b"")
    steps = load_steps(SampleRows(sets, 32, False, 1, 0), ALONE, [np.array([0, 1])], workers)
    with pytest.raises(UserError) as error:
        next(steps)
    path = sets[0].path / "tokens.bin"
    assert str(error.value) == f"{path} is damaged: it became shorter: prepare the set again"


class Deadly(SampleRows):
    """Its third row kills whoever reads it, as the kernel does when memory is short."""

    def documents(self, row: int) -> list[Encoded]:
        if row == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().documents(row)


def test_a_reader_that_dies_is_an_error(sets: list[TokenSet]) -> None:
    steps = load_steps(
        Deadly(sets, 32, False, 1, 0), ALONE, [np.array([0, 1]), np.array([2, 3])], workers=1
    )
    with pytest.raises(UserError, match=r"data.workers=1: a process that reads the data died"):
        list(steps)
