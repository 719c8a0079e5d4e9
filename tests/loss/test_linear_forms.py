"""The two forms of fused_linear_loss: which runs, what each refuses, what autograd sees of them."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_deft import fused_linear_loss
from megatron_deft.errors import UserError
from megatron_deft.loss import linear_forms, linear_head
from megatron_deft.loss.linear_forms import form_of
from megatron_deft.objectives import parse
from tests.loss.head_cases import Case, Result, check, exact, make

FORMS = ["recompute", "forward"]


def leaves(case: Case) -> tuple[Tensor, Tensor]:
    return case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()


def call(case: Case, h: Tensor, w: Tensor, **options: Any) -> Tensor:
    options = {"vocab_size": case.vocab, "token_weight": case.upstream} | options
    return fused_linear_loss(h, w, case.labels, options.pop("spec", "deft"), **options)[0]


REFUSALS: dict[str, tuple[dict[str, Any], torch.dtype, str]] = {
    "a batch mean": (
        {"spec": "cayley"}, torch.float32,
        r"objective cayley\(floor=micro_batch, eps=1e-08\) needs a mean over the batch",
    ),
    "fp16": ({}, torch.float16, "a float16 gradient needs the loss scale before it is rounded"),
    "reduction": (
        {"reduction": "none", "token_weight": None}, torch.float32,
        "the loss of every token takes upstream gradients that are not known before",
    ),
    "main_grad": (
        {"main_grad": True}, torch.float32,
        "what is added to main_grad cannot be multiplied by the upstream gradient later",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_forward_says_what_stands_against_it(name: str) -> None:
    options, dtype, reason = REFUSALS[name]
    case = make(dtype)
    h, w = leaves(case)
    w.main_grad = torch.zeros(128, 37)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=f'^form=forward: {reason}.*; use form="recompute"$'):
        call(case, h, w, form="forward", **options)
    for form in ("auto", "recompute"):
        call(case, h, w, form=form, **options).sum().backward()
        assert h.grad is not None


def test_an_unknown_form_is_named() -> None:
    case = make()
    with pytest.raises(UserError, match="form=both: legal are auto, recompute, forward"):
        call(case, case.hidden, case.weight, form="both")


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("tokens", [100, 101])
def test_auto(tokens: int, on_gpu: bool) -> None:
    """In the forward where there are several chunks, on a GPU, and nothing stands against it."""

    class Weight:
        dtype, is_cuda = torch.bfloat16, on_gpu

    def chosen(spec: str = "deft", main_grad: bool = False, reduction: str = "sum") -> str:
        return form_of("auto", parse(spec), Weight(), tokens, 100, main_grad, reduction)  # type: ignore[arg-type]

    assert chosen() == ("forward" if on_gpu and tokens > 100 else "recompute")
    assert chosen("cayley") == "recompute"
    assert chosen(main_grad=True) == "recompute"
    assert chosen(reduction="none") == "recompute"


@pytest.mark.parametrize("form", FORMS)
def test_which_form_runs_is_the_one_asked_for(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"recompute": "InForward", "forward": "Recompute"}[form]
    monkeypatch.delattr(getattr(linear_forms, other), "forward")
    case = make()
    call(case, *leaves(case), form=form, chunk_tokens=2).backward()


def test_recompute_is_right_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that were kept for the first backward are gone, and made again."""
    monkeypatch.setattr(linear_head, "CPU_TILE_TOKENS", 2)
    case = make(torch.bfloat16)
    for chunk in (100, 3):
        h, w = leaves(case)
        loss = call(case, h, w, chunk_tokens=chunk)
        first = torch.autograd.grad(loss, (h, w), retain_graph=True)
        (2 * loss).backward()
        doubled = replace(case, upstream=2 * case.upstream)
        check("DEFT", case, Result(exact("DEFT", case).loss.float(), *first, None))
        check("DEFT", doubled, Result(exact("DEFT", case).loss.float(), h.grad, w.grad, None))
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_forward_hands_its_gradients_on_once() -> None:
    case = make()
    h, w = leaves(case)
    loss = call(case, h, w, form="forward")
    loss.backward(retain_graph=True)
    assert h.grad is not None
    first = h.grad.clone()
    with pytest.raises(RuntimeError, match='a second backward needs form="recompute"'):
        loss.backward()
    assert torch.equal(h.grad, first)


@pytest.mark.parametrize("form", FORMS)
def test_no_second_derivative(form: str) -> None:
    case = make()
    h, w = leaves(case)
    loss = call(case, h, w, form=form)
    with pytest.raises(RuntimeError, match="no second derivative: call backward without create_gr"):
        torch.autograd.grad(loss, h, create_graph=True)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_has_no_history(form: str) -> None:
    case = make()
    h, w = leaves(case)
    for grad in torch.autograd.grad(call(case, h * 1.0, w, form=form), (h, w)):
        assert not grad.requires_grad


@pytest.mark.parametrize("name", ["weight", "hidden", "bias", "labels"])
def test_what_changes_before_the_backward_is_an_error(name: str) -> None:
    """Recomputed logits would be others than those the loss is of."""
    case = make(bias=True)
    labels = case.labels.clamp(min=0)  # none is ignored: nothing is copied
    parts = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    given: dict[str, Any] = {n: t.clone().requires_grad_() for n, t in parts.items()}
    loss, _ = fused_linear_loss(**given, labels=labels, vocab_size=123)
    with torch.no_grad():
        (given | {"labels": labels})[name][0] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["gate", "logp"])
def test_statistics_that_the_backward_reads_cannot_change(name: str) -> None:
    """They come back to the caller, as the very memory where no token was left out."""
    case = make(torch.float32)
    case = replace(case, labels=case.labels.clamp(min=0))
    h, w = leaves(case)
    loss, statistics = fused_linear_loss(h, w, case.labels, "deft", vocab_size=case.vocab)
    getattr(statistics, name).mul_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("form", "reduction"), [("recompute", "sum"), ("recompute", "none"), ("forward", "sum")]
)
def test_a_loss_without_a_backward_frees_all_that_it_kept(form: str, reduction: str) -> None:
    """At once: a cycle would hold hidden states and logits until Python looks for cycles."""
    case = make()
    labels = case.labels.clamp(min=0)  # none is ignored: nothing is copied
    h, w = leaves(case)
    trunk = h * 2
    seen = weakref.ref(trunk)
    gc.collect()
    gc.disable()
    try:
        loss, statistics = fused_linear_loss(
            trunk, w, labels, vocab_size=case.vocab, reduction=reduction, form=form
        )
        del trunk, loss, statistics
        assert seen() is None
    finally:
        gc.enable()


def test_forward_does_not_mind() -> None:
    case = make()
    h, w = leaves(case)
    loss = call(case, h, w, form="forward")
    with torch.no_grad():
        w.zero_()
        h.zero_()
    loss.backward()
    check("DEFT", case, Result(exact("DEFT", case).loss.float(), h.grad, w.grad, None))


@pytest.mark.parametrize("form", FORMS)
def test_the_backward_lets_go_of_the_hidden_states(form: str) -> None:
    """Whoever keeps the loss, to print it, does not keep the activations with it."""
    case = make()
    h, w = leaves(case)
    trunk = h * 1.0
    seen = weakref.ref(trunk)
    loss = call(replace(case, labels=case.labels.clamp(min=0)), trunk, w, form=form)
    del trunk
    loss.backward()
    gc.collect()
    assert seen() is None
    assert loss.isfinite()


def test_saved_tensors_may_be_elsewhere_in_between() -> None:
    """As with activations offloaded to the host: what comes back is used, and it alone is kept."""
    case = make()
    h, w = leaves(case)
    w.main_grad = torch.zeros(128, 37)  # type: ignore[attr-defined]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = call(case, h, w, main_grad=True)
    loss.backward()
    grad: Tensor = w.main_grad  # type: ignore[attr-defined]
    check("DEFT", case, Result(exact("DEFT", case).loss.float(), h.grad, grad, None))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("form", FORMS)
def test_without_a_gradient_to_make(form: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss, and not one tile is kept."""
    case = make()
    h, w = leaves(case)
    want = call(case, h, w, form=form, chunk_tokens=4)
    tiles = []
    made = linear_head.Head.logits

    def logits(self: Any, *span: Any) -> Tensor:
        assert not [t for t in tiles if t() is not None]  # the last one is gone
        z = made(self, *span)
        tiles.append(weakref.ref(z))
        return z

    monkeypatch.setattr(linear_head.Head, "logits", logits)
    monkeypatch.setattr(linear_head, "CPU_TILE_TOKENS", 2)
    with mode():
        loss = call(case, h, w, form=form, chunk_tokens=4)
    assert len(tiles) > 1
    assert not [t for t in tiles if t() is not None]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want.detach())
    frozen = call(case, h.detach(), w.detach(), form=form, chunk_tokens=4)
    assert torch.equal(frozen, loss)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_under_activation_checkpointing(form: str, reentrant: bool) -> None:
    case = make(torch.bfloat16)
    h, w = leaves(case)
    loss = checkpoint(lambda h, w: call(case, h, w, form=form), h, w, use_reentrant=reentrant)
    loss.backward()
    check("DEFT", case, Result(exact("DEFT", case).loss.float(), h.grad, w.grad, None))


def test_in_a_compiled_function() -> None:
    """It is left out of the graph, whose parts before and after stay differentiable."""
    case = make()
    h, w = leaves(case)
    compiled = torch.compile(lambda h, w: 2 * call(case, h * 0.5, w * 2.0), backend="eager")
    compiled(h, w).backward()
    doubled = replace(
        case, upstream=2 * case.upstream, hidden=h.detach() / 2, weight=2 * w.detach()
    )
    want = exact("DEFT", doubled)
    check("DEFT", doubled, Result(want.loss.float(), 2 * h.grad, w.grad / 2, None))  # type: ignore[operator]
