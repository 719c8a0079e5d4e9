"""token_loss against the float64 oracle: whole, and sharded over real gloo ranks."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft import token_loss
from megatron_deft.objectives import parse
from tests.distributed import run_ranks
from tests.oracle import SPECS, loss_and_grad

# Relative error of a gradient entry. fp32: the roundings of z - m (up to 20 here), exp and the gate
# p^a (|log p| times the error of a); half precision: the one rounding to the logits' dtype, on top.
GRAD_ULP = {torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def case(vocab: int, padded: int, dtype: torch.dtype, tokens: int = 24, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed + vocab)
    logits = torch.randn(tokens, padded, generator=generator) * 3
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::2] = logits[::2, :vocab].argmax(-1)  # some confident tokens
    labels[1::5] = -100
    logits[:, vocab:] = torch.tensor([math.nan, math.inf, 50.0] * padded)[: padded - vocab]
    upstream = torch.rand(tokens, generator=generator) + 0.5
    return logits.to(dtype), labels, upstream


def check(
    spec: str,
    logits: Tensor,
    labels: Tensor,
    upstream: Tensor,
    vocab: int,
    loss: Tensor,
    grad: Tensor,
    keep: Tensor,
    first: int = 0,
) -> None:
    """Compare with the oracle; `grad` may be the columns from `first` of the whole gradient."""
    want_loss, want_grad, want_keep, stats = loss_and_grad(spec, logits, labels, vocab, upstream)
    assert torch.equal(keep, want_keep)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=2e-6)
    want = want_grad[:, first : first + grad.shape[1]]
    ulp = GRAD_ULP[grad.dtype]
    # relative to each entry, plus the fp32 rounding of S1, which p - 1 sees as an absolute error
    scale = stats["coeff"].abs()[:, None]
    error = (grad.double() - want).abs()
    tiny = 2e-7 if grad.dtype == torch.float16 else 0.0  # half's denormals
    assert bool((error <= 1.01 * ulp * want.abs() + 4e-7 * scale + tiny).all()), error.max()
    assert bool((grad[~keep] == 0).all())
    if vocab > first:
        assert bool((grad[:, vocab - first :] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("vocab", "padded"), [(123, 128), (252, 252), (507, 512), (1, 1), (19, 24)]
)
@pytest.mark.parametrize("spec", SPECS)
def test_loss_and_gradient_against_float64(
    spec: str, vocab: int, padded: int, dtype: torch.dtype
) -> None:
    logits, labels, upstream = case(vocab, padded, dtype)
    leaf = logits.clone().requires_grad_(True)
    loss, stats = token_loss(leaf, labels, spec, vocab_size=vocab, return_stats=True)
    (loss * upstream).sum().backward()
    assert leaf.grad is not None
    check(spec, logits, labels, upstream, vocab, loss.detach(), leaf.grad, stats.keep)
    assert torch.equal(stats.loss, loss.detach())


def test_statistics_against_float64() -> None:
    logits, labels, upstream = case(507, 512, torch.float32)
    _, stats = token_loss(logits, labels, vocab_size=507, return_stats=True)
    *_, want = loss_and_grad("nll", logits, labels, 507, upstream)
    del want["coeff"]
    valid = labels != -100
    assert torch.equal(stats.valid, valid)
    for name, value in want.items():
        torch.testing.assert_close(
            getattr(stats, name)[valid].double(), value[valid], rtol=1e-5, atol=1e-6
        )
        assert bool((getattr(stats, name)[~valid] == 0).all())
    best = logits[:, :507].argmax(-1)
    assert torch.equal(stats.is_argmax, (best == labels) & valid)


def sharded(rank: int, world: int, spec: str, vocab: int, padded: int, dtype: Any) -> Any:
    logits, labels, upstream = case(vocab, padded, dtype)
    width = padded // world
    local = logits[:, rank * width : (rank + 1) * width].clone().requires_grad_(True)
    loss, stats = token_loss(
        local,
        labels,
        spec,
        group=dist.group.WORLD,
        vocab_size=vocab,
        return_stats=True,
        batch_group=dist.new_group([rank], use_local_synchronization=True),
    )
    (loss * upstream).sum().backward()
    assert local.grad is not None
    return loss.detach(), local.grad, stats.keep


def sharded_many(rank: int, world: int, cases: list[tuple[str, int, int, Any]]) -> list[Any]:
    return [sharded(rank, world, *c) for c in cases]


@pytest.mark.parametrize("world", [2, 4])
def test_shards_are_slices_of_the_whole(world: int) -> None:
    cases = [
        (spec, vocab, padded, dtype)
        for spec in SPECS
        for vocab, padded, dtype in [
            (123, 128, torch.float32),
            (252, 252, torch.bfloat16),
            (507, 512, torch.float32),
            (5, 64, torch.float32),  # the last ranks hold padding alone
        ]
    ]
    ranks = run_ranks(world, sharded_many, cases)
    for i, (spec, vocab, padded, dtype) in enumerate(cases):
        logits, labels, upstream = case(vocab, padded, dtype)
        losses = [ranks[r][i][0] for r in range(world)]
        assert all(torch.equal(losses[0], other) for other in losses)
        for r in range(world):
            loss, grad, keep = ranks[r][i]
            check(spec, logits, labels, upstream, vocab, loss, grad, keep, r * (padded // world))


def count_collectives(rank: int, world: int) -> list[str]:
    calls = []
    names = ["all_gather_into_tensor", "all_reduce", "all_gather", "reduce_scatter_tensor"]
    for name in names:
        original = getattr(dist, name)

        def counted(*args: Any, _name: str = name, _call: Any = original, **kwargs: Any) -> Any:
            calls.append(f"{_name}{list(args[1].shape) if len(args) > 1 else ''}")
            return _call(*args, **kwargs)

        setattr(dist, name, counted)
    logits = torch.randn(7, 16, requires_grad=True)
    for _ in range(2):  # the first call also asks once whether the shards are equal
        calls.clear()
        token_loss(logits, torch.arange(7), "deft", group=dist.group.WORLD).sum().backward()
    return calls


def one_shard_of_minus_infinity(rank: int, world: int) -> tuple[Tensor, Tensor]:
    row = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf], [-math.inf] * 4])[rank : rank + 1]
    logits = row.clone().requires_grad_(True)
    loss = token_loss(logits, torch.tensor([1]), "deft", group=dist.group.WORLD)
    loss.sum().backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def test_a_shard_of_minus_infinity_alone() -> None:
    (loss, first), (_, second) = run_ranks(2, one_shard_of_minus_infinity)
    whole = torch.tensor([[-1e5, 0.0, 1.0, -1e5]])
    want, grad, *_ = loss_and_grad("DEFT", whole, torch.tensor([1]), 4, torch.ones(1))
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.double(), grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(second, torch.zeros(1, 4))


def test_one_all_gather_of_five_floats_per_token() -> None:
    assert run_ranks(2, count_collectives) == [["all_gather_into_tensor[5, 7]"]] * 2


def batch_mean(rank: int, world: int, floor: str) -> Tensor:
    torch.manual_seed(rank)
    logits, labels = torch.randn(6, 9) * 2, torch.randint(0, 9, (6,))
    if rank == 1:
        labels[:] = -100
    spec = f"cayley(floor={floor})"
    return token_loss(logits, labels, spec, batch_group=dist.group.WORLD)


def test_cayley_mean_spans_the_batch_group_even_with_an_empty_rank() -> None:
    losses = run_ranks(2, batch_mean, "data_parallel")
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 9) * 2, torch.randint(0, 9, (6,))
    torch.testing.assert_close(losses[0], token_loss(logits, labels, "cayley"))
    assert bool((losses[1] == 0).all())


@pytest.mark.parametrize("spec", SPECS)
def test_all_masked_gives_zero_never_nan(spec: str) -> None:
    logits = torch.full((2, 3, 11), math.nan).requires_grad_(True)
    loss = token_loss(logits, torch.full((2, 3), -100), spec)
    loss.sum().backward()
    assert bool((loss == 0).all())
    assert logits.grad is not None
    assert bool((logits.grad == 0).all())


@pytest.mark.parametrize("shape", [(0,), (5, 0), (2, 0, 3)])
def test_no_tokens_at_all(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(*shape, 11, requires_grad=True)
    token_loss(logits, torch.zeros(shape, dtype=torch.long)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == (*shape, 11)


ROWS = {
    "very negative": torch.full((1, 40), -1e4),
    "very large": torch.full((1, 40), 1e4),
    "one hot": torch.full((1, 40), -1e4).index_fill(1, torch.tensor([3]), 1e4),
    "minus infinity elsewhere": torch.full((1, 40), -math.inf).index_fill(
        1, torch.tensor([3, 4]), 0.5
    ),
    "spread to 1e3": torch.linspace(-1e3, 1e3, 40)[None],
}


@pytest.mark.parametrize("spec", [s for s in SPECS if s != "tsallis(q=-0.3)"])
@pytest.mark.parametrize("name", ROWS)
def test_extreme_rows(name: str, spec: str) -> None:
    logits, labels = ROWS[name], torch.tensor([3])
    leaf = logits.clone().requires_grad_(True)
    loss = token_loss(leaf, labels, spec)
    loss.sum().backward()
    finite = logits.clamp(min=-1e5)  # exp(-1e5 - m) is 0 in float64 too
    want_loss, want_grad, *_ = loss_and_grad(spec, finite, labels, 40, torch.ones(1))
    torch.testing.assert_close(loss.detach().double(), want_loss, rtol=5e-6, atol=1e-6)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), want_grad, rtol=1e-5, atol=1e-7)


def test_logp_keeps_its_precision_at_large_logits() -> None:
    torch.manual_seed(1)
    logits = torch.rand(64, 5000) * 2e3 - 1e3
    labels = logits.topk(20, dim=-1).indices[torch.arange(64), torch.arange(64) % 20]
    _, stats = token_loss(logits, labels, return_stats=True)
    want = logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert bool(((stats.logp.double() - want).abs() <= 5e-6 * want.abs().clamp(min=1)).all())


def test_an_impossible_target_inside_the_vocabulary() -> None:
    """A logit of -inf is legal: p = 0, and no 0 * inf becomes nan."""
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0]])
    for spec in ("dft", "p", "deft", "cayley", "tsallis(q=0.5)", "eaft"):
        leaf = logits.clone().requires_grad_(True)
        loss, stats = token_loss(leaf, torch.tensor([2]), spec, return_stats=True)
        loss.sum().backward()
        assert leaf.grad is not None
        assert not leaf.grad.isnan().any(), spec
        assert not loss.isnan().any(), spec
        assert stats.p.item() == 0
        assert stats.entropy.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_a_broken_logit_is_seen_in_the_loss(spec: str, single: bool, bad: float) -> None:
    """No threshold drops it and no weight of 0 hides it: a training run must notice."""
    if single and parse(spec).gate(11) is None:
        pytest.skip("has a mean over the batch: two passes only")
    logits = torch.randn(3, 11)
    logits[1, 4] = bad
    leaf = logits.clone().requires_grad_(True)
    loss, stats = token_loss(
        leaf, torch.tensor([1, 2, 3]), spec, grad_in_forward=single, return_stats=True
    )
    if spec not in ("nll", "p") or bad != math.inf or not loss[1].isinf():
        assert bool(loss[1].isnan()), loss
    assert bool(stats.keep[1])


def test_inplace_backward_uses_the_logits_own_storage() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 8)
    weight = torch.randn(33, 8, requires_grad=True)
    labels = torch.tensor([1, 2, -100, 30, 0])
    gradients = []
    for inplace in (False, True):
        weight.grad = None
        logits = hidden @ weight.t()
        pointer, received = logits.data_ptr(), []
        logits.register_hook(lambda g, out=received: out.append((g.data_ptr(), g.clone())))
        token_loss(logits, labels, inplace_backward=inplace).sum().backward()
        assert (received[0][0] == pointer) is inplace
        gradients.append((received[0][1], weight.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_inplace_backward_fails_loudly_when_the_logits_are_used_again() -> None:
    base = torch.randn(5, 8, requires_grad=True)
    logits = base * 1.0
    loss = token_loss(logits, torch.arange(5), inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = base * 1.0
    both = logits.exp().sum() + logits.square().sum()
    loss = token_loss(logits, torch.arange(5), inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + both).backward()


FORMS = [
    {"inplace_backward": inplace, "grad_in_forward": single}
    for inplace in (False, True)
    for single in (False, True)
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_second_derivative(form: dict[str, bool]) -> None:
    """Not even after a plain sum, whose upstream gradient has none."""
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    loss = token_loss(hidden @ weight, torch.arange(3), **form).sum()
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="token_loss has no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_gradient_has_no_history(form: dict[str, bool]) -> None:
    """In place it is the memory of the logits, which a matmul made."""
    logits = torch.randn(3, 4) @ torch.randn(4, 5, requires_grad=True)
    loss = token_loss(logits, torch.arange(3), **form).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    assert not grad.requires_grad
    assert (grad.data_ptr() == logits.data_ptr()) == form["inplace_backward"]


def test_p_and_dft_share_the_gradient() -> None:
    logits, labels, _ = case(123, 123, torch.float32)
    grads, losses = [], []
    for spec in ("p", "dft"):
        leaf = logits.clone().requires_grad_(True)
        loss = token_loss(leaf, labels, spec)
        loss.sum().backward()
        grads.append(leaf.grad)
        losses.append(loss.detach())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(losses[0], losses[1])
