"""Batches against their definition, position by position."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_deft.data.batches import HOST_KEYS, collate, positions, to_device
from megatron_deft.data.samples import IGNORE, Encoded

PER_POSITION = ("tokens", "labels", "weights", "position_ids", "documents")


def sample(length: int, seed: int = 0) -> Encoded:
    generator = np.random.default_rng(seed)
    weights = generator.choice([0.0, 1.0, 0.5], length).astype(np.float32)
    return Encoded(generator.integers(1, 1000, length, np.int32), weights)


def expected_row(row: list[Encoded], length: int, multiple: int) -> list[dict[str, Any]]:
    """A row position by position; `document` counts within the row."""
    out: list[dict[str, Any]] = []
    document = -1
    for document, one in enumerate(row):
        used = len(one.tokens) - 1
        padded = -(-used // multiple) * multiple
        for t in range(padded):
            weight = float(one.weights[t + 1]) if t < used else 0.0
            label = int(one.tokens[t + 1]) if weight else IGNORE
            token = int(one.tokens[t]) if t < used else 0
            out.append(dict(zip(PER_POSITION, (token, label, weight, t, document), strict=True)))
    rest = length - len(out)
    return out + [
        dict(zip(PER_POSITION, (0, IGNORE, 0.0, t, document + 1), strict=True)) for t in range(rest)
    ]


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[list[list[Encoded]], int, int]:
    context = draw(st.sampled_from([1, 2, 3]))
    multiple = 1 if context == 1 else 2 * context
    rows = draw(st.lists(st.lists(st.integers(2, 30), max_size=4), min_size=1, max_size=3))
    taken = max(sum(int(positions(n, context)) for n in row) for row in rows)
    length = max(taken, multiple) + multiple * draw(st.integers(0, 2))
    return [[sample(n, 7 * i + n) for i, n in enumerate(row)] for row in rows], length, context


@given(packed_rows())
@settings(max_examples=150, deadline=None)
def test_packed_rows_are_documents_end_to_end(
    problem: tuple[list[list[Encoded]], int, int],
) -> None:
    rows, length, context = problem
    multiple = 1 if context == 1 else 2 * context
    cells: list[dict[str, Any]] = []
    for row in rows:
        first = cells[-1]["documents"] + 1 if cells else 0
        cells += [
            {**cell, "documents": cell["documents"] + first}
            for cell in expected_row(row, length, multiple)
        ]
    number = cells[-1]["documents"] + 1
    sizes = np.bincount([cell["documents"] for cell in cells])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for rank in range(context):
        batch = collate(rows, length, packed=True, context_size=context, context_rank=rank)
        assert batch["cu_seqlens"].tolist() == starts.tolist()
        assert batch["cu_seqlens"].dtype == torch.int32
        mine = []
        for document in range(number):
            chunks = np.arange(starts[document], starts[document + 1]).reshape(multiple, -1)
            chosen = [rank, 2 * context - 1 - rank] if context > 1 else [0]
            mine += chunks[chosen].ravel().tolist()
        for name in PER_POSITION:
            assert batch[name].shape == (1, len(cells) // context)
            assert batch[name][0].tolist() == [cells[i][name] for i in mine], name


@pytest.mark.parametrize("context", [1, 2, 4])
def test_dense_rows_are_samples_side_by_side(context: int) -> None:
    """That megatron-core cuts them alike is tested where there are ranks, in tests/models."""
    rows = [[sample(17)], [sample(30, 1)], [], [sample(3, 2)]]
    cells = [expected_row(row, 32, 1) for row in rows]
    for number, row in enumerate(cells):
        for t, cell in enumerate(row):
            cell |= {"documents": number, "position_ids": t}
    for rank in range(context):
        batch = collate(rows, 32, packed=False, context_size=context, context_rank=rank)
        chunks = np.arange(32).reshape(2 * context, -1)
        mine = chunks[[rank, 2 * context - 1 - rank]].ravel()
        assert set(batch) == set(PER_POSITION)
        for name in PER_POSITION:
            assert batch[name].tolist() == [[row[t][name] for t in mine] for row in cells], name


def test_types_and_where_they_live() -> None:
    batch = collate([[sample(5), sample(4)]], 8, packed=True)
    assert [str(batch[name].dtype) for name in PER_POSITION] == [
        "torch.int64", "torch.int64", "torch.float32", "torch.int64", "torch.int64"
    ]  # fmt: skip
    moved = to_device(batch, torch.device("meta"))
    assert {name for name in moved if moved[name].device.type == "cpu"} == HOST_KEYS


def test_documents_without_a_position_are_left_out() -> None:
    one, none = sample(1), Encoded(np.zeros(0, np.int32), np.zeros(0, np.float32))
    batch = collate([[one, sample(5), none]], 4, packed=True)
    assert batch["cu_seqlens"].tolist() == [0, 4]
    assert collate([[one]], 4, packed=False)["labels"].tolist() == [[IGNORE] * 4]
    assert positions(np.array([0, 1, 2, 9]), 2).tolist() == [0, 0, 4, 8]
    assert positions(np.array([0, 1, 2, 9])).tolist() == [0, 0, 1, 8]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([[sample(6), sample(5)]], {"packed": True}),
        ([[sample(3), sample(3)]], {"packed": False}),
        ([[sample(10)]], {"packed": False}),
        ([[sample(3)]], {"packed": True, "context_size": 3}),
        ([[sample(6), sample(4)]], {"packed": True, "context_size": 2}),  # 8 + 4 when padded
        ([], {"packed": True}),
    ],
)
def test_what_does_not_fit_is_refused(rows: list[list[Encoded]], options: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        collate(rows, 8, **options)
