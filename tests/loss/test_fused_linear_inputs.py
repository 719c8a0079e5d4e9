"""What fused_linear_loss takes: shapes, strides, dtypes and autocast; what it refuses, and how."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_deft import fused_linear_loss
from megatron_deft.errors import UserError
from tests.loss.head_cases import Result, check, exact, fused, make, plain

FORMS = ["recompute", "forward"]


@pytest.mark.parametrize("form", FORMS)
def test_int32_labels(form: str) -> None:
    case = make()
    want, _ = fused_linear_loss(case.hidden, case.weight, case.labels, vocab_size=123, form=form)
    got, _ = fused_linear_loss(
        case.hidden, case.weight, case.labels.int(), vocab_size=123, form=form
    )
    assert torch.equal(got, want)


def views(hidden: Tensor) -> dict[str, Tensor]:
    """The same values [24, H] at other shapes and strides."""
    return {
        "sequence first": hidden.reshape(6, 4, -1),
        "batch first": hidden.reshape(4, 6, -1).transpose(0, 1).contiguous().transpose(0, 1),
        "every second row": torch.stack([hidden, -hidden], 1).flatten(0, 1)[::2],
        "tokens last": hidden.t().contiguous().t(),
        "part of wider rows": torch.cat([hidden, hidden], 1)[:, : hidden.shape[1]],
        "four dimensions": hidden.reshape(2, 3, 4, -1),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("all_kept", [False, True])
@pytest.mark.parametrize("name", views(torch.zeros(24, 2)))
def test_shapes_and_strides(name: str, all_kept: bool, form: str) -> None:
    """Hidden states that no label lets go are not copied: their strides reach the products."""
    case = make(tokens=24)
    labels = case.labels.clamp(min=0) if all_kept else case.labels
    results = []
    for hidden in (case.hidden, views(case.hidden)[name]):
        h, w = hidden.detach().requires_grad_(), case.weight.clone().requires_grad_()
        shape = h.shape[:-1]
        loss, stats = fused_linear_loss(
            h, w, labels.reshape(shape), vocab_size=123, form=form, chunk_tokens=30,
            token_weight=case.upstream.reshape(shape),
        )  # fmt: skip
        loss.backward()
        assert h.grad is not None
        assert h.grad.shape == h.shape
        assert {value.shape for value in vars(stats).values()} == {shape}
        results.append((stats.loss.flatten(), h.grad.reshape(24, -1), w.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_one_token_without_dimensions() -> None:
    hidden, weight = torch.randn(6, requires_grad=True), torch.randn(9, 6)
    loss, stats = fused_linear_loss(hidden, weight, torch.tensor(3), reduction="none")
    loss.backward()
    assert loss.shape == stats.p.shape == ()
    assert hidden.grad is not None
    assert hidden.grad.shape == (6,)


def test_the_same_hidden_states_for_all_tokens() -> None:
    """Of stride 0, and a weight that is another's transpose."""
    row = torch.randn(1, 6, requires_grad=True)
    weight = torch.randn(6, 9, requires_grad=True)
    labels = torch.tensor([1, 5, 7])
    fused_linear_loss(row.expand(3, 6), weight.t(), labels)[0].backward()
    whole, straight = row.detach().repeat(3, 1), weight.detach().t().contiguous()
    whole.requires_grad_(), straight.requires_grad_()
    fused_linear_loss(whole, straight, labels)[0].backward()
    torch.testing.assert_close(row.grad, whole.grad.sum(0, keepdim=True))  # type: ignore[union-attr]
    torch.testing.assert_close(weight.grad, straight.grad.t())  # type: ignore[union-attr]


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form: str) -> None:
    """As a linear layer under autocast: computed in bf16, gradients in the leaves' fp32."""
    case = make(torch.bfloat16, bias=True)
    assert case.bias is not None
    parts = (case.hidden.float(), case.weight.float(), case.bias.float())
    h, w, b = (t.requires_grad_() for t in parts)
    with torch.autocast("cpu", torch.bfloat16):
        loss, stats = fused_linear_loss(
            h, w, case.labels, bias=b, vocab_size=123, token_weight=case.upstream, form=form
        )
    loss.backward()
    assert loss.dtype == h.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32  # type: ignore[union-attr]
    grads = [t.grad.bfloat16() for t in (h, w, b)]  # type: ignore[union-attr]
    assert torch.equal(grads[0].float(), h.grad)  # type: ignore[arg-type]
    check("DEFT", case, Result(stats.loss, *grads))


def test_a_backward_under_autocast_is_the_same() -> None:
    """Whatever the region around it: the recomputed logits are those of the forward."""
    for dtype in (torch.float32, torch.float16):
        case, grads = make(dtype), []
        for enabled in (False, True):
            h, w = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
            loss, _ = fused_linear_loss(h, w, case.labels, vocab_size=123)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss.backward(retain_graph=True)
                loss.backward()  # of logits that are made again
            grads.append((h.grad, w.grad))
        for ours, want in zip(*grads, strict=True):
            assert torch.equal(ours, want)


def test_a_bias_of_its_own_dtype() -> None:
    """As under megatron-core's Float16Module: its gradient comes in that dtype."""
    case = make(torch.bfloat16, bias=True)
    assert case.bias is not None
    bias = case.bias.float().requires_grad_()
    loss, stats = fused_linear_loss(
        case.hidden, case.weight, case.labels, bias=bias, vocab_size=123, token_weight=case.upstream
    )
    loss.backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32
    result = Result(stats.loss, None, None, bias.grad.bfloat16())
    check("DEFT", case, result)


@pytest.mark.parametrize("form", FORMS)
def test_token_weights_of_zero_are_like_ignored_labels(form: str) -> None:
    case = make()
    weights = torch.where(case.labels == -100, 0.0, case.upstream)
    h, w = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
    labels = case.labels.clamp(min=0)
    loss, stats = fused_linear_loss(
        h, w, labels, vocab_size=123, token_weight=weights.double(), form=form, chunk_tokens=4
    )
    loss.backward()
    assert bool((stats.loss[weights == 0] > 0).all())  # logged as they are
    masked = stats.loss.where(case.labels != -100, torch.zeros(()))
    check("DEFT", case, Result(masked, h.grad, w.grad, None))
    torch.testing.assert_close(loss, (masked * weights).sum())


def test_another_ignore_index() -> None:
    case = make()
    labels = torch.where(case.labels == -100, 5, torch.where(case.labels == 5, 6, case.labels))
    want, _ = fused_linear_loss(
        case.hidden, case.weight, torch.where(labels == 5, -100, labels), vocab_size=123
    )
    got, stats = fused_linear_loss(case.hidden, case.weight, labels, vocab_size=123, ignore_index=5)
    assert torch.equal(got, want)
    assert torch.equal(stats.valid, labels != 5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", FORMS)
def test_broken_hidden_states_are_seen_in_the_loss(form: str, bad: float) -> None:
    case = make()
    case.hidden[2, 5] = bad
    h = case.hidden.clone().requires_grad_()
    loss, stats = fused_linear_loss(h, case.weight, case.labels, vocab_size=123, form=form)
    loss.backward()
    assert bool(loss.isnan())
    assert stats.loss.isnan().nonzero().flatten().tolist() == [2]
    assert bool(stats.keep[2])


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_of_minus_infinity_takes_entries_out(form: str) -> None:
    case = make(bias=True)
    assert case.bias is not None
    absent = [i for i in range(123) if i not in case.labels.tolist()]
    case.bias[absent[::2]] = -torch.inf
    check("DEFT", case, fused("DEFT", case, form=form, chunk_tokens=4))


@pytest.mark.parametrize("form", FORMS)
def test_softcap_where_it_is_flat(form: str) -> None:
    """Logits far beyond the cap: the gradient dies, and is not nan."""
    case = make(softcap=0.5)
    case.hidden.mul_(100)
    check("DEFT", case, fused("DEFT", case, form=form, chunk_tokens=4))


HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(8, 4)
LABELS = torch.zeros(2, 3, dtype=torch.long)
ONES = torch.ones(2, 3)


def call(hidden: Any = HIDDEN, weight: Any = WEIGHT, labels: Any = LABELS, **options: Any) -> Any:
    return fused_linear_loss(hidden, weight, labels, options.pop("objective", "deft"), **options)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("hidden: expected a strided tensor, got list", {"hidden": [[1.0]]}),
    ("weight: expected a strided tensor, got list", {"weight": [[1.0]]}),
    ("labels: expected a strided tensor, got ndarray", {"labels": np.zeros((2, 3), np.int64)}),
    ("bias: expected a strided tensor, got float", {"bias": 0.0}),
    ("weight: expected a strided tensor, got torch.sparse_coo", {"weight": WEIGHT.to_sparse()}),
    ("hidden: expected device cpu, got meta", {"hidden": HIDDEN.to("meta")}),
    ("labels: expected device cpu, got meta", {"labels": LABELS.to("meta")}),
    (r"\[..., H\] and \[V_local, H\], got \[2, 3, 4\] and \[4, 8\]", {"weight": WEIGHT.t()}),
    (r"got \[2, 3, 4\] and \[4\]", {"weight": WEIGHT[0]}),
    (r"got \[\] and \[8, 4\]", {"hidden": torch.zeros(())}),
    ("got torch.bfloat16 and torch.float32; convert one", {"hidden": HIDDEN.bfloat16()}),
    ("one dtype of .*, got torch.float64 and torch.float64",
     {"hidden": HIDDEN.double(), "weight": WEIGHT.double()}),
    (r"bias: expected shape \[8\], got \[4\]", {"bias": torch.zeros(4)}),
    (r"labels: expected shape \[2, 3\] .*, got \[6\]", {"labels": LABELS.flatten()}),
    (r"labels: expected int64 or int32, got torch.float32; call .long\(\)",
     {"labels": LABELS.float()}),
    ("labels: expected 0 to 7 .*, got 8", {"labels": LABELS + 8}),
    ("labels: expected 0 to 4 .*, got 5", {"labels": LABELS + 5, "vocab_size": 5}),
    ("got -1", {"labels": LABELS - 1}),
    (r"vocab_size: expected 1 to 8 .*, got 9", {"vocab_size": 9}),
    ("vocab_size: expected 1 to 8", {"vocab_size": 0}),
    ("vocab_size: expected an int, got 8.0", {"vocab_size": 8.0}),
    ("legal are", {"objective": "cross-entropy"}),
    ("softcap: expected a finite number > 0 or None, got 0", {"softcap": 0}),
    ("softcap: expected .*, got -1.0", {"softcap": -1.0}),
    ("softcap: expected .*, got inf", {"softcap": torch.inf}),
    ("softcap: expected .*, got nan", {"softcap": torch.nan}),
    ("softcap: expected .*, got '30'", {"softcap": "30"}),
    ("chunk_tokens: expected an int >= 1 or None, got 0", {"chunk_tokens": 0}),
    ("chunk_tokens: expected an int >= 1 or None, got 2.5", {"chunk_tokens": 2.5}),
    ("chunk_tokens: expected an int >= 1 or None, got True", {"chunk_tokens": True}),
    ("kept_tokens: expected an int >= 0 or None, got -1", {"kept_tokens": -1}),
    ("kept_tokens=5 is below the 6 labels that are not ignored", {"kept_tokens": 5}),
    ("reduction=mean: legal are sum, none", {"reduction": "mean"}),
    ("token_weight: expected a tensor of floats, got float", {"token_weight": 2.0}),
    ("token_weight: expected a tensor of floats, got torch.int64", {"token_weight": LABELS}),
    (r'token_weight: not with reduction="none"; multiply',
     {"token_weight": ONES, "reduction": "none"}),
    (r"token_weight is a constant and gets no gradient; call .detach\(\)",
     {"token_weight": ONES.clone().requires_grad_()}),
    (r"token_weight: expected shape \[2, 3\] on cpu, like the labels, got \[6\] on cpu",
     {"token_weight": ONES.flatten()}),
    ("got .* on meta", {"token_weight": ONES.to("meta")}),
    ("main_grad=True needs weight.main_grad, a tensor; this weight has none", {"main_grad": True}),
]  # fmt: skip


# under autocast, too, unless it makes two dtypes one
REFUSED = [(*row, a) for row in BAD for a in (False, True) if not (a and "convert" in row[0])]


@pytest.mark.parametrize(("message", "options", "autocast"), REFUSED)
def test_bad_input_is_one_clear_line(message: str, options: dict[str, Any], autocast: bool) -> None:
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(UserError, match=message) as caught,
    ):
        call(**options)
    assert "\n" not in str(caught.value)


def test_the_witnesses_agree() -> None:
    """The head differentiated by hand is what autograd makes of it, in float64."""
    case = make(torch.float32, bias=True, softcap=4.0)
    by_hand, by_autograd = exact("DEFT", case), plain("DEFT", case)
    for got, want in zip(by_autograd, by_hand, strict=True):
        assert got is not None
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
