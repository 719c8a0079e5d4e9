"""Each reduction against loops over Python floats, also where samples are packed or shared."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_deft import reduce_loss
from megatron_deft.errors import UserError
from tests.distributed import run_ranks

REDUCTIONS = ("token", "micro_batch", "sample")


def batch(seed: int) -> dict[str, Tensor]:
    """Two rows of 12 tokens, packed with documents 0 to 4; the last has no kept token."""
    torch.manual_seed(seed)
    keep = torch.rand(2, 12) < 0.6
    documents = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4, [3] * 8 + [4] * 4])
    keep[1, 8:] = False
    weights = torch.tensor([0.25, 1.0, 3.0])[torch.randint(0, 3, (2, 12))]
    return {
        "loss": torch.rand(2, 12).where(keep, 0),
        "keep": keep,
        "weights": weights.where(keep, 0),
        "documents": documents,
    }


def oracle(batch: dict[str, Tensor], reduction: str) -> float:
    """The mean of one batch."""
    groups: dict[int, tuple[float, float]] = {}
    columns = (batch[name].flatten().tolist() for name in ("loss", "keep", "weights", "documents"))
    for loss, keep, weight, document in zip(*columns, strict=True):
        total, count = groups.get(document, (0.0, 0.0))
        if keep:
            groups[document] = (total + weight * loss, count + weight)
    if reduction == "sample":
        return sum(total / count for total, count in groups.values()) / len(groups)
    return sum(t for t, _ in groups.values()) / sum(c for _, c in groups.values())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("seed", range(5))
def test_weights_and_packed_documents(reduction: str, seed: int) -> None:
    one = batch(seed)
    numerator, denominator = reduce_loss(one.pop("loss"), one.pop("keep"), reduction, **one)
    assert (numerator / denominator).item() == pytest.approx(oracle(batch(seed), reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_are_samples_and_weights_are_one_unless_given(reduction: str) -> None:
    one = batch(0)
    rows = torch.arange(2)[:, None].expand(2, 12)
    plain = reduce_loss(one["loss"], one["keep"], reduction)
    ones = torch.ones(2, 12)
    given = reduce_loss(one["loss"], one["keep"], reduction, weights=ones, documents=rows)
    assert plain[1].dtype == torch.int64
    assert [x.item() for x in plain] == pytest.approx([x.item() for x in given])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_kept_is_nothing(reduction: str) -> None:
    zeros = torch.zeros(2, 3)
    numerator, denominator = reduce_loss(zeros, zeros > 1, reduction, weights=torch.ones(2, 3))
    assert (numerator.item(), denominator.item()) == (0, int(reduction == "micro_batch"))


def share(rank: int, world: int, reduction: str) -> list[float]:
    """This rank's numerator and denominator of a batch whose tokens are dealt to the ranks."""
    import torch.distributed as dist

    order = random.Random(7).sample(range(12), 12)
    mine = order[rank::world]
    part: dict[str, Any] = {name: value[:, mine] for name, value in batch(3).items()}
    numerator, denominator = reduce_loss(
        part.pop("loss"), part.pop("keep"), reduction, **part, group=dist.group.WORLD
    )
    return [numerator.item(), denominator.item()]


def all_shares(rank: int, world: int) -> dict[str, list[float]]:
    return {reduction: share(rank, world, reduction) for reduction in REDUCTIONS}


def test_tokens_shared_among_ranks_have_the_mean_of_one() -> None:
    shares = run_ranks(2, all_shares)
    for reduction in REDUCTIONS:
        numerator, denominator = torch.tensor([s[reduction] for s in shares]).sum(0).tolist()
        assert numerator / denominator == pytest.approx(oracle(batch(3), reduction)), reduction


def test_an_unknown_reduction_is_named() -> None:
    with pytest.raises(UserError, match="reduction=mean: legal are token, micro_batch, sample"):
        reduce_loss(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "mean")
