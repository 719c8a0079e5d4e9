"""Reading and writing torch_dist states piece by piece."""

from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_deft.convert import state
from megatron_deft.convert.mapping import Slot
from megatron_deft.convert.state import Chunk, StateReader, write_state
from megatron_deft.convert.streams import progress_bar
from megatron_deft.errors import UserError

KEY, SIZE = "experts.weight", (3, 4, 6, 5)  # layers, experts, rows, columns


def whole() -> Tensor:
    return torch.arange(3 * 4 * 6 * 5, dtype=torch.float32).reshape(SIZE)


def cut(tensor: Tensor, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    places = tuple(slice(o, o + s) for o, s in zip(offsets, shape, strict=True))
    return tensor[places].clone()


def written(folder: Path, shape: tuple[int, ...], leave_out: int = 0) -> Path:
    """A state whose one tensor is stored in chunks of `shape`."""
    starts = product(*(range(0, size, step) for size, step in zip(SIZE, shape, strict=True)))
    chunks = [
        Chunk(Slot(KEY, SIZE, offsets, shape), torch.float32, partial(cut, whole(), offsets, shape))
        for offsets in starts
    ]
    write_state(folder, chunks[leave_out:], progress_bar("", 0, shown=False))
    return folder


@pytest.mark.parametrize(
    "shape", [(1, 1, 6, 5), (1, 1, 3, 5), (1, 4, 6, 5), (1, 2, 2, 5), (3, 4, 6, 5), (1, 1, 1, 1)]
)
def test_any_part_of_any_layout(tmp_path: Path, shape: tuple[int, ...]) -> None:
    reader = StateReader(written(tmp_path / "state", shape))
    for offsets, wanted in (
        ((1, 2, 0, 0), (1, 1, 6, 5)),
        ((0, 0, 0, 0), SIZE),
        ((2, 3, 2, 1), (1, 1, 3, 2)),
        ((0, 1, 4, 0), (3, 2, 2, 5)),
    ):
        found = reader.read(Slot(KEY, SIZE, offsets, wanted))
        assert torch.equal(found, cut(whole(), offsets, wanted)), (offsets, wanted)


def test_an_expert_is_found_without_looking_at_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = []
    plan = state.create_read_items_for_chunk_list

    def counting(key, stored, regions):  # type: ignore[no-untyped-def]
        looked_at.append(len(stored.chunks))
        return plan(key, stored, regions)

    monkeypatch.setattr(state, "create_read_items_for_chunk_list", counting)
    reader = StateReader(written(tmp_path / "state", (1, 1, 3, 5)))
    for layer, expert in product(range(3), range(4)):
        reader.read(Slot(KEY, SIZE, (layer, expert, 0, 0), (1, 1, 6, 5)))
    assert looked_at == [2] * 12


def test_a_chunk_that_is_not_there(tmp_path: Path) -> None:
    reader = StateReader(written(tmp_path / "state", (1, 1, 3, 5), leave_out=1))
    with pytest.raises(UserError, match=r"experts.weight at \[0, 0, 0, 0\] holds 15 of 30 values"):
        reader.read(Slot(KEY, SIZE, (0, 0, 0, 0), (1, 1, 6, 5)))
