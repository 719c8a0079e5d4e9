"""A packed batch gives each document the very loss and gradient it has alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_deft.data.batches import collate
from megatron_deft.data.samples import Encoded
from megatron_deft.loss.attach import attach
from megatron_deft.models.packed import packed_seq_params
from megatron_deft.platform import initialize, shutdown
from tests.models.documents import (
    FAMILIES,
    VOCAB,
    alone,
    build,
    by_place,
    documents,
    gradients,
    token_losses,
    tolerance,
)

# Neighbours of equal length, which are attended to together, one document of a single position, and
# some longer than the windows.
LENGTHS = (13, 7, 7, 1, 9)
ROW = 40  # 37 are used


@pytest.fixture(autouse=True, scope="module")
def model_parallel() -> Iterator[None]:
    initialize(seed=3)
    yield
    shutdown()


def assert_same(found: dict[Any, Any], expected: dict[Any, Any], **limits: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, msg=lambda text, key=key: f"{key}: {text}", **limits
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_each_document_has_the_loss_and_gradient_it_has_alone(name: str) -> None:
    samples, model = documents(*LENGTHS), build(name)
    losses, expected = alone(model, samples)
    batch = collate([samples], ROW, packed=True)
    loss = token_losses(model, batch)
    assert_same(by_place(loss, batch), losses, **tolerance(name))
    for number in range(len(samples)):
        chosen = batch["weights"] * (batch["documents"] == number)
        (loss * chosen).sum().backward(retain_graph=True)
        found = gradients(model)
        # An expert that serves other documents only gets a gradient of exactly nothing.
        for parameter in found.keys() - expected[number].keys():
            assert not found.pop(parameter).any()
        assert_same(found, expected[number], **tolerance(name))


@pytest.mark.parametrize("objective", ["deft", "nll", "dft", "eaft", "tsallis(q=0.5)"])
def test_each_document_has_its_objective_alone(objective: str) -> None:
    samples, model = documents(*LENGTHS), build("llama", torch.float32)
    attach(model, objective, vocab_size=VOCAB, inplace_backward=False, grad_in_forward=False)

    def losses(rows: list[Any], length: int, packed: bool) -> tuple[torch.Tensor, Any]:
        batch = collate(rows, length, packed=packed)
        loss = model(
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"],
            packed_seq_params=packed_seq_params(batch),
        )  # fmt: skip
        return loss, batch

    together, batch = losses([samples], ROW, packed=True)
    for number, sample in enumerate(samples):
        by_itself, its_batch = losses([[sample]], len(sample.tokens) - 1, packed=False)
        mine = batch["documents"] == number
        # Logits of up to 30, each rounded to 2e-6 of itself by sums in another order.
        torch.testing.assert_close(together[mine], by_itself[0], rtol=1e-4, atol=1e-5)
        (by_itself * its_batch["weights"]).sum().backward()
        expected = gradients(model)
        (together * batch["weights"] * mine).sum().backward(retain_graph=True)
        for name, found in gradients(model).items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5 * scale)


def test_rows_of_a_packed_batch_and_recomputation() -> None:
    samples, model = documents(*LENGTHS), build("llama", recompute="full")
    losses, expected = alone(model, samples)
    batch = collate([samples[:2], [], samples[2:]], 24, packed=True)
    loss = token_losses(model, batch)
    real = {0: 0, 1: 1, 4: 2, 5: 3, 6: 4}  # the others are the rows' padding
    found = {(real[d], t): value for (d, t), value in by_place(loss, batch).items()}
    assert_same(found, losses, **tolerance("llama"))
    (loss * batch["weights"]).sum().backward()
    for name, value in gradients(model).items():
        whole = sum(part[name] for part in expected)
        torch.testing.assert_close(value, whole, **tolerance("llama"))


def test_no_document_sees_another() -> None:
    """What one document holds changes nothing in another, and would if they were taken for one."""
    samples, model = documents(*LENGTHS), build("llama")
    others = list(samples)
    others[1] = Encoded((samples[1].tokens + 1) % VOCAB, samples[1].weights)
    batches = [collate([row], ROW, packed=True) for row in (samples, others)]
    with torch.no_grad():
        before, after = (token_losses(model, batch) for batch in batches)
        as_one = [token_losses(model, batch, runs=((1, ROW),)) for batch in batches]
    outside = batches[0]["documents"] != 1
    assert torch.equal(before[outside], after[outside])
    assert not torch.equal(before[~outside], after[~outside])
    later = (batches[0]["documents"] > 1) & (batches[0]["weights"] > 0)
    assert (as_one[0] - as_one[1])[later].abs().min() > 1e-4


def test_packed_attention_drops_in_training_only() -> None:
    attention = build("llama").decoder.layers[0].self_attention.core_attention
    packed = packed_seq_params(collate([documents(4, 4, 3)], 12, packed=True))
    inputs = [torch.randn(12, heads, 8) for heads in (4, 2, 2)]
    exact = attention(*inputs, None, packed_seq_params=packed)
    attention.dropout = 0.5
    mean = torch.stack(
        [attention(*inputs, None, packed_seq_params=packed) for _ in range(3000)]
    ).mean(0)
    assert not torch.equal(mean, exact)
    torch.testing.assert_close(mean, exact, rtol=0, atol=0.2)
    assert torch.equal(attention.eval()(*inputs, None, packed_seq_params=packed), exact)


def test_why_max_seqlen_has_to_be_exact() -> None:
    """megatron-core takes as many frequencies as the batch has positions for absolute ones."""
    model, batch = build("llama"), collate([documents(*LENGTHS)], ROW, packed=True)
    with torch.no_grad():
        exact = token_losses(model, batch)
        longer = token_losses(model, batch, max_seqlen_q=ROW - 1, max_seqlen_kv=ROW - 1)
        padded = token_losses(model, batch, max_seqlen_q=ROW, max_seqlen_kv=ROW)
    assert torch.equal(exact, longer)
    # Attention sees differences of positions, so what is off is the rounding of float32 angles:
    # little here, but far from what the other tests allow, and more where documents are longer.
    assert (exact - padded).abs().max() > 1e-10


def test_packed_params() -> None:
    params = packed_seq_params(collate([documents(*LENGTHS)], ROW, packed=True))
    assert params is not None
    assert params.runs == ((1, 13), (2, 7), (1, 1), (1, 9), (1, 3))
    assert params.max_seqlen_q == params.max_seqlen_kv == 13
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv.tolist() == [
        0, 13, 20, 27, 28, 37, 40
    ]  # fmt: skip
    assert (params.qkv_format, params.cu_seqlens_q_padded) == ("thd", None)
    assert packed_seq_params(collate([documents(3)], 8, packed=False)) is None
