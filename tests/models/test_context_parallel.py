"""Every position of a document is on one rank, and gathered parts come back in order."""

import pytest
import torch

from megatron_deft.models.context_parallel import held, in_order


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_hold_every_position_once_and_as_much_work(size: int) -> None:
    length = 24
    work = []
    seen: list[int] = []
    for rank in range(size):
        own = [p for start, end in held(length, size, rank) for p in range(start, end)]
        seen += own
        work.append(sum(position + 1 for position in own))  # the keys that each attends to
    assert sorted(seen) == list(range(length))
    assert len(set(work)) == 1


@pytest.mark.parametrize("size", [2, 3])
def test_gathered_parts_are_put_in_order(size: int) -> None:
    documents, length = 2, 12
    whole = torch.arange(documents * length).view(documents, length, 1)
    parts = [
        torch.cat([whole[:, start:end] for start, end in held(length, size, rank)], 1)
        for rank in range(size)
    ]
    assert torch.equal(in_order(torch.stack(parts)), whole)
