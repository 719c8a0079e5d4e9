"""grad_in_forward: the gradient made with the statistics, while the row is on chip."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft import attach, ops, token_loss
from megatron_deft.errors import UserError
from megatron_deft.objectives import parse
from tests.distributed import run_ranks
from tests.loss.test_attach import VOCAB, batch, gpt
from tests.oracle import SPECS, loss_and_grad

ELIGIBLE = [spec for spec in SPECS if parse(spec).batch_mean is None]


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(24, 512, generator=generator) * 3).to(dtype)
    logits[:, 507:] = torch.nan
    labels = torch.randint(0, 507, (24,), generator=generator)
    labels[:3] = logits[:3, :507].argmax(-1)
    labels[1::5] = -100
    return logits, labels


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ELIGIBLE)
def test_against_float64(spec: str, dtype: torch.dtype, unit: bool, inplace: bool) -> None:
    logits, labels = case(dtype)
    upstream = torch.ones(24) if unit else torch.linspace(-2, 2, 24)
    want, want_grad, keep, _ = loss_and_grad(spec, logits[:, :507], labels, 507, upstream)
    leaf = logits.clone().requires_grad_(True)
    loss, stats = token_loss(
        leaf, labels, spec, vocab_size=507, return_stats=True, inplace_backward=inplace,
        grad_in_forward=True,
    )  # fmt: skip
    (loss * upstream).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(stats.keep, keep)
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=2e-6)
    # rounded once where the upstream is 1, twice where it is not
    ulp = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype] * (1 if unit else 2)
    torch.testing.assert_close(leaf.grad[:, :507].double(), want_grad, rtol=1.01 * ulp, atol=1e-6)
    assert bool((leaf.grad[:, 507:] == 0).all())
    assert bool((leaf.grad[labels == -100] == 0).all())


def test_in_place_the_logits_become_the_gradient_in_the_forward() -> None:
    logits, labels = case(torch.bfloat16)
    leaf = logits.clone().requires_grad_(True)
    pointer = leaf.data_ptr()
    before = leaf._version
    loss = token_loss(
        leaf, labels, vocab_size=507, inplace_backward=True, grad_in_forward=True
    ).sum()
    assert leaf._version > before
    assert bool((leaf[labels == -100] == 0).all())
    (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert grad.data_ptr() == pointer
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_out_of_place_the_logits_stay() -> None:
    logits, labels = case(torch.bfloat16)
    leaf = logits.clone().requires_grad_(True)
    token_loss(leaf, labels, vocab_size=507, grad_in_forward=True).sum().backward()
    torch.testing.assert_close(leaf.detach(), logits, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_without_a_gradient_to_make_the_logits_stay(requires_grad: bool) -> None:
    logits, labels = case(torch.float32)
    leaf = logits.clone().requires_grad_(requires_grad)
    with torch.set_grad_enabled(not requires_grad):
        loss = token_loss(leaf, labels, vocab_size=507, inplace_backward=True, grad_in_forward=True)
    torch.testing.assert_close(leaf.detach(), logits, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(loss, token_loss(logits, labels, vocab_size=507))


def test_a_saved_value_of_the_logits_is_an_error_not_a_wrong_gradient() -> None:
    base = torch.randn(5, 8, requires_grad=True)
    logits = base * 1.0
    square = logits.square().sum()
    loss = token_loss(logits, torch.arange(5), inplace_backward=True, grad_in_forward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + square).backward()


def split_vocabulary(rank: int, world: int) -> str:
    logits = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(UserError) as caught:
        token_loss(logits, torch.zeros(2).long(), group=dist.group.WORLD, grad_in_forward=True)
    return str(caught.value)


def test_what_stands_against_it_is_named() -> None:
    assert "split over tensor-parallel ranks" in run_ranks(2, split_vocabulary)[0]
    logits, labels = torch.randn(2, 4, requires_grad=True), torch.zeros(2).long()
    with pytest.raises(UserError, match=r"cayley\(.*needs a mean over the batch"):
        token_loss(logits, labels, "cayley", grad_in_forward=True)
    with pytest.raises(UserError, match="loss scale"):
        token_loss(logits.half(), labels, grad_in_forward=True)


def attached(rank: int, world: int) -> dict[str, tuple[int, Tensor]]:
    model = gpt(world, "bf16")
    tokens, labels, positions = batch()
    made: list[int] = []
    original = ops.row_stats_grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return original(*args, **kwargs)

    ops.row_stats_grad = counted  # type: ignore[assignment]
    results = {}
    for name, per_token, objective in [
        ("sum", True, "deft"),
        ("mean", False, "deft"),
        ("batch mean", True, "cayley"),
    ]:
        model.config.calculate_per_token_loss = per_token
        made.clear()
        attachment = attach(model, objective, vocab_size=VOCAB)
        loss = model(tokens, positions, None, labels=labels)
        (grad,) = torch.autograd.grad(loss.sum(), model.output_layer.weight)
        results[name] = len(made), grad
        attachment.detach()
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_attach_uses_it_where_the_losses_are_summed_and_the_vocabulary_is_whole(
    world: int,
) -> None:
    results = run_ranks(world, attached)[0]
    uses = {name: count for name, (count, _) in results.items()}
    assert uses == {"sum": 1 if world == 1 else 0, "mean": 0, "batch mean": 0}
    torch.testing.assert_close(results["sum"][1], results["mean"][1], rtol=2**-7, atol=1e-3)
