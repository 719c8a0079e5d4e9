"""Heads of multi-token prediction: in packed rows and shared ones, each document by itself."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft.data.batches import collate
from tests.distributed import run_ranks

LENGTHS = (13, 7, 7, 1, 9)
ROW = 40
SHARED_ROW = 48  # each document padded to a multiple of 4
Found = tuple[Tensor, dict[str, Tensor]]


def train(model: Any, batch: Any, objective: str) -> Found:
    """Sums of the heads' losses and of their weights, and every gradient; over all ranks."""
    from megatron_deft.loss.attach import attach
    from megatron_deft.models.heads import rolled
    from megatron_deft.models.packed import packed_seq_params
    from megatron_deft.training.statistics import head_sums
    from tests.models.documents import VOCAB, gradients

    attachment = attach(model, objective, vocab_size=VOCAB)
    packed = packed_seq_params(batch)
    loss = model(
        batch["tokens"], batch["position_ids"], None, labels=batch["labels"],
        loss_mask=batch["weights"], packed_seq_params=packed,
    )  # fmt: skip
    (loss * batch["weights"]).sum().backward()
    assert attachment.statistics is not None
    assert torch.equal(attachment.statistics.valid, batch["labels"] >= 0)
    sums = head_sums(attachment.heads, rolled(batch["weights"], 2, packed))
    found = gradients(model)
    for tensor in (sums, *found.values()):
        dist.all_reduce(tensor)
    return sums, found


def heads(rank: int, world: int) -> dict[str, Found]:
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    from megatron_deft import platform
    from megatron_deft.models.heads import initialize_heads
    from tests.models.documents import build, documents, total

    platform.initialize(context=world, seed=3)
    MTPLossAutoScaler.set_loss_scale(torch.ones(1))
    model = build("llama", torch.float32, context=world, mtp_layers=2, mtp_loss_weight=0.7)
    initialize_heads([model], seed=5)
    samples = documents(*LENGTHS)
    row = ROW if world == 1 else SHARED_ROW
    batch = collate([samples], row, packed=True, context_size=world, context_rank=rank)
    found = {objective: train(model, batch, objective) for objective in ("deft", "cayley")}
    if world == 1:
        parts = [
            train(model, collate([[one]], len(one.tokens) - 1, packed=False), "deft")
            for one in samples
        ]
        found["alone"] = sum(sums for sums, _ in parts), total([grads for _, grads in parts])
    return found


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, int], Found]:
    by_world = {world: run_ranks(world, heads)[0] for world in (1, 2)}
    return {(name, world): f for world, names in by_world.items() for name, f in names.items()}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("deft", 1), ("alone", 1)),
        (("deft", 2), ("alone", 1)),
        # whose batch mean counts the labels there are and nothing of what is rolled in
        (("cayley", 2), ("cayley", 1)),
    ],
)
def test_heads_see_a_document_as_they_see_it_alone(
    found: dict[tuple[str, int], Found], one: tuple[str, int], other: tuple[str, int]
) -> None:
    (sums, gradients), (expected_sums, expected) = found[one], found[other]
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-5)
    assert sums.min() > 1
    assert gradients.keys() == expected.keys()
    assert sum(name.startswith("mtp.") for name in expected) == 20
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=2e-5 * scale, msg=name)
