"""fused_linear_loss on a GPU against float64, without a host synchronisation; else skipped."""

import math

import pytest
import torch
from torch import Tensor

from megatron_deft import fused_linear_loss, token_loss
from megatron_deft.loss.inputs import raise_on_wrong_labels
from tests.oracle import loss_and_grad

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS, HIDDEN = 300, 96


def inputs(padded: int, valid: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight whose padding is nan, labels of which 40% are ignored."""
    generator = torch.Generator(device="cuda").manual_seed(valid)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, device="cuda").to(dtype)
    weight = torch.randn(padded, HIDDEN, generator=generator, device="cuda").mul_(0.2).to(dtype)
    weight[valid:] = math.nan
    labels = torch.randint(0, valid, (TOKENS,), generator=generator, device="cuda")
    ignored = torch.rand(TOKENS, generator=generator, device="cuda") < 0.4
    return hidden, weight, labels.masked_fill(ignored, -100)


def exact(
    spec: str, hidden: Tensor, weight: Tensor, labels: Tensor, valid: int, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight in float64."""
    h, w = hidden.double(), weight[:valid].double()
    _, grad, _, _ = loss_and_grad(spec, h @ w.t(), labels, valid, upstream)
    return grad @ w, grad.t() @ h


def error(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest value."""
    return ((got.double() - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize(("padded", "valid"), [(5120, 5120), (5120, 5003)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["nll", "DEFT", "eaft", "Cayley_Trans"])
def test_gradients(spec: str, dtype: torch.dtype, padded: int, valid: int) -> None:
    hidden, weight, labels = inputs(padded, valid, dtype)
    upstream = torch.rand(TOKENS, device="cuda") + 0.5
    want = exact(spec, hidden, weight, labels, valid, upstream)
    h, w = (t.clone().requires_grad_(True) for t in (hidden, weight[:valid]))
    z = torch.nn.functional.linear(h, w)
    plain = torch.autograd.grad((token_loss(z, labels, spec) * upstream).sum(), (h, w))
    kept = int((labels >= 0).sum())
    for form in ("recompute", "forward"):
        if form == "forward" and (dtype == torch.float16 or spec == "Cayley_Trans"):
            continue
        for chunk_tokens, bound in ((64, None), (64, kept), (4096, kept + 5)):
            h, w = (t.clone().requires_grad_(True) for t in (hidden, weight))
            loss, stats = fused_linear_loss(
                h, w, labels, spec, token_weight=upstream, vocab_size=valid,
                chunk_tokens=chunk_tokens, form=form, kept_tokens=bound,
            )  # fmt: skip
            (loss * 0.5).backward()
            assert h.grad is not None
            assert w.grad is not None
            assert not w.grad[valid:].any()
            assert not h.grad[labels < 0].any()
            assert torch.equal(stats.valid, labels >= 0)
            got = (h.grad * 2, w.grad[:valid] * 2)
            floor = torch.finfo(dtype).eps / 2
            for mine, theirs, right in zip(got, plain, want, strict=True):
                assert error(mine, right) <= 2 * max(error(theirs, right), floor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_main_grad_takes_two_micro_batches(dtype: torch.dtype) -> None:
    hidden, weight, labels = inputs(5120, 5003, dtype)
    w = torch.nn.Parameter(weight)
    w.main_grad = torch.zeros(5120, HIDDEN, device="cuda")  # type: ignore[attr-defined]
    for chunk_tokens in (64, 4096):
        loss, _ = fused_linear_loss(
            hidden, w, labels, "deft", vocab_size=5003, chunk_tokens=chunk_tokens, main_grad=True
        )
        loss.backward()
    plain = weight[:5003].clone().requires_grad_(True)
    z = torch.nn.functional.linear(hidden, plain)
    (theirs,) = torch.autograd.grad(token_loss(z, labels, "deft").sum(), plain)
    ones = torch.ones(TOKENS, device="cuda")
    _, want = exact("DEFT", hidden, weight, labels, 5003, ones)
    main_grad: Tensor = w.main_grad  # type: ignore[attr-defined]
    assert not main_grad[5003:].any()
    floor = torch.finfo(dtype).eps / 2
    assert error(main_grad[:5003] / 2, want) <= 2 * max(error(theirs, want), floor)


@pytest.mark.parametrize("form", ["recompute", "forward"])
def test_no_host_synchronisation(form: str) -> None:
    hidden, weight, labels = inputs(5120, 5003, torch.bfloat16)
    weight[5003:] = 0
    hidden.requires_grad_(True)
    weight.requires_grad_(True)

    def step() -> None:
        loss, _ = fused_linear_loss(
            hidden, weight, labels, "deft", vocab_size=5003, chunk_tokens=64, form=form,
            kept_tokens=250,
        )  # fmt: skip
        loss.backward()

    step()  # the first use of a device makes its counter of wrong labels, and waits for it
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_too_low_a_bound_and_wrong_labels_are_nan() -> None:
    hidden, weight, labels = inputs(5120, 5120, torch.bfloat16)
    loss, _ = fused_linear_loss(hidden, weight, labels, "deft", kept_tokens=10)
    assert loss.isnan()
    labels[3] = 5120
    loss, _ = fused_linear_loss(hidden, weight, labels, "deft", reduction="none")
    assert loss.isnan().nonzero().tolist() == [[3]]
    with pytest.raises(ValueError, match="1 on cuda"):
        raise_on_wrong_labels()


def test_memory_is_a_chunk() -> None:
    """Beyond hidden, weight and the weight's gradient: 1.2 chunks, whatever the tokens."""
    columns, chunk = 32000, 512
    weight = torch.randn(columns, 256, device="cuda").bfloat16().requires_grad_(True)
    for tokens in (2048, 8192):
        hidden = torch.randn(tokens, 256, device="cuda").bfloat16().requires_grad_(True)
        labels = torch.randint(0, columns, (tokens,), device="cuda")
        hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = fused_linear_loss(
            hidden, weight, labels, "deft", chunk_tokens=chunk, form="recompute"
        )
        loss.backward()
        used = torch.cuda.max_memory_allocated() - before
        gradients = 4 * weight.numel() + 2 * weight.numel() + 2 * hidden.numel() * 3
        assert used - gradients <= 1.2 * chunk * columns * 2
