"""fused_linear_loss in one process: gradients against float64, whatever goes through it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_deft import fused_linear_loss, token_loss
from megatron_deft.errors import UserError
from megatron_deft.loss import linear_head
from megatron_deft.objectives import parse
from tests.loss import head_cases
from tests.loss.head_cases import DTYPES, Case, Result, check, exact, fused, make, only
from tests.oracle import SPECS


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Any:
    with head_cases.uninitialised_memory_is_nan():
        yield


def layouts(spec: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One tile; tiles that divide neither tokens nor vocabulary; the same for the other form."""
    both: list[dict[str, Any]] = [{"chunk_tokens": 200}, {"chunk_tokens": 9}]
    if parse(spec).batch_mean or dtype == torch.float16:
        return both
    return [*both, {"chunk_tokens": 10, "form": "forward"}]


COMPUTED = [(torch.float32, True), *((d, m) for d in DTYPES[1:] for m in (True, False))]


@pytest.fixture(params=COMPUTED, ids=lambda p: f"{p[0]}, products in {'it' if p[1] else 'fp32'}")
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Each dtype, on a processor that multiplies it and on one that does not; small tiles."""
    monkeypatch.setattr(linear_head, "CPU_TILE_TOKENS", 8)
    monkeypatch.setattr(linear_head, "_cpu_multiplies", lambda _: request.param[1])
    found: torch.dtype = request.param[0]
    return found


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_against_float64(spec: str, dtype: torch.dtype) -> None:
    case = make(dtype, tokens=123, vocab=507, padded=512)
    for layout in layouts(spec, dtype):
        check(spec, case, fused(spec, case, **layout))


@pytest.mark.parametrize("spec", ["nll", "cayley(floor=data_parallel)", "DEFT"])
def test_bias_and_softcap(spec: str, dtype: torch.dtype) -> None:
    plain_case = make(dtype, tokens=31, bias=True)
    capped = make(dtype, tokens=31, softcap=4.0)
    both = make(dtype, tokens=31, bias=True, softcap=4.0)
    for case in (plain_case, capped, both):
        for layout in layouts(spec, dtype):
            check(spec, case, fused(spec, case, **layout))


@pytest.mark.parametrize("mode", ["reference", "native"])
@pytest.mark.parametrize("spec", ["eaft", "DEFT"])
def test_compiled_operators_and_their_twins(
    spec: str, mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_DEFT_OPS", mode)
    case = make(dtype, bias=True, softcap=4.0)
    for layout in layouts(spec, dtype):
        check(spec, case, fused(spec, case, **layout))


@pytest.mark.parametrize("tokens", [1, 2, 7, 8])
@pytest.mark.parametrize("vocab", [1, 2, 11])
def test_chunk_boundaries_everywhere(
    tokens: int, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of tokens in a chunk, and in a tile, with what is left over in the last."""
    case = make(tokens=tokens, width=5, vocab=vocab, padded=vocab + 2)
    case = replace(case, labels=case.labels.clamp(min=0))
    want = exact("DEFT", case)
    for chunk in range(1, tokens + 2):
        for height in range(1, tokens + 1):
            monkeypatch.setattr(linear_head, "CPU_TILE_TOKENS", height)
            for form in ("recompute", "forward"):
                got = fused("DEFT", case, chunk_tokens=chunk, form=form)
                for ours, truth in zip(got[:3], want[:3], strict=True):
                    assert ours is not None
                    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("spec", ["nll", "Cayley_Trans", "eaft"])
def test_an_upstream_gradient_of_its_own_for_every_token(spec: str) -> None:
    case = make(torch.bfloat16)
    case = replace(case, upstream=torch.linspace(-2, 2, 23))
    check(spec, case, fused(spec, case, reduction="none", chunk_tokens=5))


@pytest.mark.parametrize("form", ["recompute", "forward"])
def test_a_scalar_upstream_other_than_one(form: str) -> None:
    case = make(torch.bfloat16)
    h, w = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
    loss, _ = fused_linear_loss(h, w, case.labels, vocab_size=123, form=form, chunk_tokens=4)
    (loss * -0.3).backward()
    scaled = replace(case, upstream=torch.full((23,), -0.3))
    check("DEFT", scaled, Result(exact("DEFT", scaled).loss.float(), h.grad, w.grad, None))


FORMS = ["recompute", "forward"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [[], [0], [22], [3, 4, 5, 6]], ids=str)
def test_few_kept_tokens_or_none(kept: list[int], of: torch.dtype, form: str) -> None:
    case = only(make(of, bias=True), kept)
    for chunk in (1, 3, 100):
        got = fused("DEFT", case, form=form, chunk_tokens=chunk)
        check("DEFT", case, got)
        for grad in got if not kept else ():
            assert grad is not None
            assert bool((grad == 0).all())


@pytest.mark.parametrize("more", [0, 3, 1000])
def test_ignored_tokens_may_go_along(more: int, dtype: torch.dtype) -> None:
    """With a bound of their number, as on a GPU: they are computed, and count nothing."""
    for case in (make(dtype, bias=True), only(make(dtype), [])):
        bound = int((case.labels != -100).sum()) + more
        for layout in layouts("eaft", dtype):
            check("eaft", case, fused("eaft", case, kept_tokens=bound, **layout))


@pytest.mark.parametrize("spec", SPECS)
def test_zero_kept_tokens_with_every_objective(spec: str) -> None:
    case = only(make(torch.float16), [])
    case = replace(case, hidden=torch.full_like(case.hidden, torch.nan))  # nobody looks at them
    for part in fused(spec, case, reduction="none")[:3]:
        assert part is not None
        assert bool((part == 0).all())


def test_no_tokens_at_all() -> None:
    weight = torch.randn(7, 4, requires_grad=True)
    for shape in ((0,), (2, 0), (0, 3)):
        hidden = torch.randn(*shape, 4, requires_grad=True)
        loss, stats = fused_linear_loss(hidden, weight, torch.zeros(shape, dtype=torch.long))
        loss.backward()
        assert loss.item() == 0
        assert stats.p.shape == shape
        assert hidden.grad is not None
        assert hidden.grad.shape == (*shape, 4)
    assert weight.grad is not None
    assert bool((weight.grad == 0).all())


def test_padding_changes_nothing(dtype: torch.dtype) -> None:
    """The same bits as without the padded rows, whose gradient is 0."""
    case = make(dtype, bias=True)
    assert case.bias is not None
    assert not case.weight[123:].isfinite().any()
    bare = replace(case, weight=case.weight[:123].clone(), bias=case.bias[:123].clone())
    padded, want = fused("eaft", case), fused("eaft", bare)
    assert torch.equal(padded.loss, want.loss)
    for ours, theirs in zip(padded[1:], want[1:], strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours[: len(theirs)], theirs)
        assert bool((ours[len(theirs) :] == 0).all())


def plain_micro_batches(batches: list[Case], main_grad: Tensor) -> Tensor:
    for case in batches:
        grad = head_cases.plain("DEFT", case).weight
        assert grad is not None
        main_grad.add_(grad.to(main_grad.dtype))
    return main_grad


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["main fp32", "main bf16"])
def test_two_micro_batches_into_main_grad(dtype: torch.dtype, kind: torch.dtype) -> None:
    batches = [make(dtype), replace(make(dtype, seed=1), weight=make(dtype).weight)]
    batches.insert(1, only(batches[0], []))  # and between them one without a kept token
    start = torch.randn(128, 37).to(kind)
    weight = torch.nn.Parameter(batches[0].weight.clone())
    weight.main_grad = start.clone()  # type: ignore[attr-defined]
    truth = start.double()
    for case in batches:
        hidden = case.hidden.clone().requires_grad_()
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        loss, _ = fused_linear_loss(
            hidden, weight, case.labels, vocab_size=123, token_weight=case.upstream,
            main_grad=True, chunk_tokens=3,
        )  # fmt: skip
        loss.backward()
        assert weight.grad_added_to_main_grad is True  # type: ignore[attr-defined]
        want = exact("DEFT", case)
        check("DEFT", case, Result(want.loss.float(), hidden.grad, None, None))
        assert want.weight is not None
        truth += want.weight
    ours, theirs = weight.main_grad, plain_micro_batches(batches, start.clone())  # type: ignore[attr-defined]
    half_unit = head_cases.HALF_UNIT[kind]
    allowed = 2 * max(head_cases.error(theirs, truth), half_unit)
    assert head_cases.error(ours, truth) <= allowed
    assert torch.equal(ours[123:], start[123:])


@pytest.mark.parametrize("is_read", [False, True])
def test_main_grad_speaks_with_distributed_data_parallel(is_read: bool) -> None:
    """Its hook runs though nothing is in .grad, unless the weight's other gradient is added."""
    case, calls = make(torch.bfloat16), []
    weight = torch.nn.Parameter(case.weight.clone())
    weight.main_grad = torch.zeros(128, 37)  # type: ignore[attr-defined]
    if is_read:
        weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
    embedded = weight[:3].float().sum()  # the other use of a tied weight
    loss, _ = fused_linear_loss(case.hidden, weight, case.labels, vocab_size=123, main_grad=True)
    (loss + embedded if is_read else loss).backward()
    (grad,) = calls
    assert grad.shape == weight.shape
    if is_read:
        want = torch.zeros(128, 37)
        want[:3] = 1
        assert torch.equal(grad.float(), want)


def test_main_grad_under_autocast() -> None:
    """It is the parameter's, not that of its copy in autocast's dtype."""
    case = make(torch.float32)
    weight = torch.nn.Parameter(case.weight.clone())
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = fused_linear_loss(
            case.hidden, weight, case.labels, vocab_size=case.vocab, main_grad=True
        )
    loss.backward()
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    half = case.weight.bfloat16().requires_grad_()
    loss, _ = fused_linear_loss(case.hidden.bfloat16(), half, case.labels, vocab_size=case.vocab)
    loss.backward()
    assert half.grad is not None
    rounded = weight.main_grad.bfloat16()  # type: ignore[attr-defined]
    assert torch.equal(rounded, half.grad)
    assert half.grad.abs().max() > 0


def test_main_grad_of_another_shape() -> None:
    case = make(torch.float32)
    weight = torch.nn.Parameter(case.weight.clone())
    weight.main_grad = torch.zeros(3, 3)  # type: ignore[attr-defined]
    expected = r"weight\.main_grad: expected shape \[128, 37\], got \[3, 3\]"
    with pytest.raises(UserError, match=expected):
        fused_linear_loss(case.hidden, weight, case.labels, vocab_size=case.vocab, main_grad=True)


def test_a_frozen_weight_is_not_added_to_main_grad() -> None:
    case = make()
    weight = torch.nn.Parameter(case.weight.clone(), requires_grad=False)
    weight.main_grad = torch.ones(128, 37)  # type: ignore[attr-defined]
    hidden = case.hidden.clone().requires_grad_()
    fused_linear_loss(hidden, weight, case.labels, vocab_size=123, main_grad=True)[0].backward()
    assert bool((weight.main_grad == 1).all())  # type: ignore[attr-defined]
    assert not hasattr(weight, "grad_added_to_main_grad")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_one_gradient_alone(wanted: str, form: str) -> None:
    """A frozen head (LoRA), a frozen trunk; the others' products are not made."""
    case = make(torch.bfloat16, bias=True)
    assert case.bias is not None
    parts = {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}
    leaves = {name: t.clone().requires_grad_(name == wanted) for name, t in parts.items()}
    loss, stats = fused_linear_loss(
        leaves["hidden"], leaves["weight"], case.labels, bias=leaves["bias"], vocab_size=123,
        token_weight=case.upstream, form=form, chunk_tokens=4,
    )  # fmt: skip
    loss.backward()
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    assert [name for name, grad in grads.items() if grad is not None] == [wanted]
    check("DEFT", case, Result(stats.loss, **grads))


def dyadic(dtype: torch.dtype, tokens: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weight whose products are exact in any order and dtype."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randint(-2, 3, (tokens, 6), generator=generator).to(dtype)
    weight = torch.randint(-2, 3, (41, 6), generator=generator).to(dtype) / 4
    labels = torch.randint(0, 37, (tokens,), generator=generator)
    labels[::4] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("spec", ["nll", "OnlyTopP-0.1", "eaft", "Cayley_Trans", "DEFT"])
def test_statistics_are_those_of_token_loss(spec: str, dtype: torch.dtype) -> None:
    """On the same logits: to the bit from one tile, to fp32's roundings from many."""
    hidden, weight, labels = dyadic(dtype)
    logits = (hidden.double() @ weight.double().t()).to(linear_head.tile_dtype(weight))
    _, want = token_loss(logits, labels, spec, vocab_size=37, return_stats=True)
    _, one = fused_linear_loss(hidden, weight, labels, spec, vocab_size=37)
    _, many = fused_linear_loss(hidden, weight, labels, spec, vocab_size=37, chunk_tokens=3)
    valid = labels != -100
    for name, value in vars(want).items():
        expected = value.where(valid, torch.zeros_like(value))  # left out: 0
        got = getattr(one, name)
        if spec == "Cayley_Trans" and name in ("loss", "gate"):  # another order in the mean
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)
        else:
            assert torch.equal(got, expected), name
        torch.testing.assert_close(getattr(many, name), expected, rtol=1e-5, atol=1e-6)
        assert not got.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_twice(form: str) -> None:
    case = make(torch.bfloat16, tokens=123, vocab=507, padded=512, bias=True, softcap=5.0)
    first, second = (fused("DEFT", case, form=form, chunk_tokens=11) for _ in range(2))
    for ours, again in zip(first, second, strict=True):
        assert ours is not None
        assert again is not None
        assert torch.equal(ours, again)
