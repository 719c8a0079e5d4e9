"""The head in tiles: what a plan covers, what it costs in memory and in products."""

import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megatron_deft import fused_linear_loss
from megatron_deft.loss import linear_head
from megatron_deft.loss.inputs import Shard
from megatron_deft.loss.linear_head import Head, Plan, add_product, plan_of, tile_dtype
from megatron_deft.objectives import parse
from tests.loss.head_cases import HALF_UNIT, error

SIZES = [(1, 1, 1), (7, 5, 3), (23, 128, 1), (600, 5003, 3), (5000, 151_936, 27), (512, 300, 512)]


def covered(spans: list[tuple[int, int]]) -> list[int]:
    assert all(start < end for start, end in spans)
    return [i for span in spans for i in range(*span)]


def head_of(hidden: Tensor, weight: Tensor, plan: Plan, shard: Shard | None = None) -> Head:
    shard = shard or Shard(0, len(weight), len(weight), -100, None)
    return Head(hidden, weight, None, torch.zeros(len(hidden)).long(), shard, None, plan)


def plans(tokens: int, vocab: int, chunk: int) -> Iterator[Plan]:
    plan = plan_of(torch.empty(vocab, 2), tokens, chunk)
    yield from (plan, plan.in_rows(1), plan.in_rows(2))


@pytest.mark.parametrize(("tokens", "vocab", "chunk"), SIZES)
def test_tiles_cover_every_logit_once(tokens: int, vocab: int, chunk: int) -> None:
    for plan in plans(tokens, vocab, chunk):
        assert covered(plan.token_spans(tokens)) == list(range(tokens))
        assert covered(plan.column_spans(vocab)) == list(range(vocab))
        assert plan.token_spans(0) == plan.column_spans(0) == []


@pytest.mark.parametrize(("tokens", "vocab", "chunk"), SIZES)
def test_a_tile_is_a_part_of_a_chunk(tokens: int, vocab: int, chunk: int) -> None:
    """Save where a tile of one column, or of one row, is already more."""
    plan = plan_of(torch.empty(vocab, 2), tokens, chunk)
    assert plan.columns == 1 or plan.tokens * plan.columns <= chunk * vocab / linear_head.CPU_PARTS
    for at_once in (1, 2):
        tokens = plan.in_rows(at_once).tokens
        assert tokens == 1 or tokens * at_once <= chunk


def kept_tiles(tokens: int, vocab: int, chunk: int) -> tuple[int, int]:
    """Of logits: how many stay after the forward, and how many there are."""
    head = head_of(
        torch.empty(tokens, 2), torch.empty(vocab, 2), plan_of(torch.empty(vocab, 2), tokens, chunk)
    )
    last = head.last_chunk()
    assert all(tile in itertools.product(head.rows, head.columns) for tile in last)
    return sum((r[1] - r[0]) * (c[1] - c[0]) for r, c in last), tokens * vocab


@pytest.mark.parametrize(("tokens", "vocab", "chunk"), SIZES)
def test_a_chunk_stays_after_the_forward(tokens: int, vocab: int, chunk: int) -> None:
    stays, _ = kept_tiles(tokens, vocab, chunk)
    assert stays <= chunk * vocab
    for count in {1, min(tokens, chunk), chunk}:  # all of them, where they fit
        stays, there_are = kept_tiles(count, vocab, chunk)
        assert stays == there_are


def test_tiles_are_high_and_their_weights_no_larger() -> None:
    weight = torch.empty(5003, 2)
    assert plan_of(weight, 101, 100).tokens == 101
    assert plan_of(weight, 10**6, 100).tokens == linear_head.CPU_TILE_TOKENS
    assert plan_of(weight, 10**6, 10**4).tokens == 10**4 // linear_head.CPU_PARTS
    for size in (2, 64, 4096):
        plan = plan_of(torch.empty(5003, size), 100, 100)
        assert plan.columns * size <= 100 * 5003 / linear_head.CPU_PARTS


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("dtype", HALF_UNIT)
def test_the_default_chunk_is_so_many_bytes(
    dtype: torch.dtype, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_head, "_cpu_multiplies", lambda _: multiplies)
    for vocab in (1000, 151_936):
        weight = torch.empty(vocab, 2, dtype=dtype)
        item = tile_dtype(weight).itemsize
        row, most = vocab * item, linear_head.CPU_CHUNK_BYTES[item]
        assert most - row < plan_of(weight, 10**6).chunk_tokens * row <= most
        # the cap's derivative lies beside the logits
        assert most - 2 * row < 2 * plan_of(weight, 10**6, softcap=30.0).chunk_tokens * row <= most
    assert plan_of(torch.empty(10**8, 0), 10).chunk_tokens == 1


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("factors", HALF_UNIT)
@pytest.mark.parametrize("dtype", HALF_UNIT)
def test_add_product(
    dtype: torch.dtype, factors: torch.dtype, transposed: bool, overwrite: bool
) -> None:
    """Of all dtypes that meet: the factors' rounding, and the sum's."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(9, 31, generator=generator).to(factors)
    a = a.t().contiguous().t() if transposed else a
    b = torch.randn(31, 13, generator=generator).to(factors)
    out = torch.randn(9, 13, generator=generator).to(dtype)
    want = a.double() @ b.double()
    plain = a @ b
    if dtype == torch.float32 and not overwrite:
        want, plain = want + out.double(), plain.float() + out
    if overwrite:
        out.fill_(torch.nan)
    add_product(out, a, b, overwrite)
    allowed = 2 * max(error(plain.to(dtype), want), HALF_UNIT[dtype])
    assert error(out, want) <= allowed


class Live(TorchDispatchMode):
    """Bytes of what operators made and nobody has freed: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in given | self.known:
                storage, key = tensor.untyped_storage(), storage_of(tensor)
                self.known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


V, H, CHUNK = 8192, 64, 64


def operands(dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) / 8).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (tokens,))


def peak(
    dtype: torch.dtype, tokens: int, kept: int | None = None, **options: Any
) -> tuple[float, int]:
    """In chunks of logits, above the gradients of hidden (and its fp32 sum) and weight; bytes."""
    hidden, weight, labels = operands(dtype, tokens)
    if kept is not None:
        labels[kept:] = -100
    gc.collect()
    with Live() as live:
        loss, _ = fused_linear_loss(hidden, weight, labels, chunk_tokens=CHUNK, **options)
        loss.backward()
    size = dtype.itemsize
    gradients = weight.numel() * size + hidden.numel() * (size if size == 4 else size + 4)
    chunk = CHUNK * V * tile_dtype(weight).itemsize
    return (live.peak - gradients) / chunk, live.peak


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_most_a_fifth_more_than_a_chunk_however_many_tokens(
    dtype: torch.dtype, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_head, "_cpu_multiplies", lambda _: multiplies)
    once, twice = (peak(dtype, tokens)[0] for tokens in (1024, 2048))
    assert 0.9 < once <= 1.2  # the least: the tiles do exist, and are counted
    assert twice <= 1.2
    assert abs(twice - once) <= 0.05


def test_the_forward_form_holds_a_chunk_too() -> None:
    assert 0.9 < peak(torch.float32, 1024, form="forward")[0] <= 1.2


def test_memory_is_that_of_the_kept_tokens() -> None:
    """Above the gradient of all hidden states, which are there anyway."""
    few, many = (peak(torch.float32, tokens, kept=20)[1] for tokens in (20, 4096))
    # the gradient of the hidden states, labels and what is known of each token
    per_token = H * 4 + 150
    assert many - few <= (4096 - 20) * per_token + 2 * 20 * H * 4


@pytest.mark.parametrize("tokens", [40, 1024])
def test_without_a_gradient_one_tile_at_a_time(tokens: int) -> None:
    hidden, weight, labels = operands(torch.float32, tokens)
    gc.collect()
    with torch.no_grad(), Live() as live:
        loss, stats = fused_linear_loss(hidden, weight, labels, chunk_tokens=CHUNK)
    plan = plan_of(weight, tokens, CHUNK)
    rows = min(plan.tokens, tokens)
    tile, sums = 4 * rows * plan.columns, 5 * 4 * rows * len(plan.column_spans(V))
    assert tile <= live.peak <= 1.1 * tile + sums + 200 * tokens
    assert live.now <= 100 * tokens  # losses and statistics
    assert loss.isfinite()
    assert stats.keep.all()


LINEAR = {torch.ops.mkldnn._linear_pointwise: lambda a, w, *_, **__: 2 * a[0] * a[1] * w[0]}


def flops(ignored: int = 0, **options: Any) -> float:
    """Of all matrix products of 64 tokens, in products of tokens x H x the real vocabulary."""
    frozen = options.pop("frozen", "")
    hidden = torch.randn(64, 16, requires_grad=frozen != "hidden")
    weight = torch.randn(40, 16, requires_grad=frozen != "weight")
    labels = torch.arange(64) % 37
    labels[:ignored] = -100
    with FlopCounterMode(display=False, custom_mapping=LINEAR) as counter:
        loss, _ = fused_linear_loss(hidden, weight, labels, vocab_size=37, **options)
        loss.backward()
    return counter.get_total_flops() / (2 * 64 * 16 * 37)


def test_products_are_of_kept_tokens_and_real_vocabulary() -> None:
    """Three products where all tiles could be kept, of which each is multiplied on twice."""
    assert flops(chunk_tokens=64) == 3
    assert flops(chunk_tokens=64, ignored=32) == 1.5
    assert flops(chunk_tokens=64, ignored=64) == 0
    assert flops(form="forward", chunk_tokens=5) == 3
    assert flops(form="forward", chunk_tokens=5, ignored=32) == 1.5
    assert flops(chunk_tokens=64, frozen="weight") == 2
    assert flops(chunk_tokens=64, frozen="hidden") == 2


def test_tiles_that_were_not_kept_are_the_fourth_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_head, "CPU_TILE_TOKENS", 8)
    made = flops(chunk_tokens=8)  # in 4 tiles of 8 x 10, and 40 columns
    assert 3 < made < 4
    assert flops(chunk_tokens=8, ignored=32) == pytest.approx(made / 2, rel=0.1)


@pytest.mark.parametrize("objective", ["nll", "eaft"])
def test_a_shard_of_padding_alone_has_no_sums(objective: str) -> None:
    """Neutral among other shards': maximum -inf, nothing to add."""
    topk = parse(objective).topk
    shard = Shard(8, 0, 8, -100, None)
    head = head_of(torch.randn(3, 2), torch.full((4, 2), torch.nan), Plan(3, 3, 4), shard)
    sums = linear_head.Tiles(head).sums(topk, keep=True)
    others = torch.randn(5 + topk, 3)
    others[1:4].abs_()
    others[5:] = others[5:].sort(0, descending=True).values
    torch.testing.assert_close(linear_head.combine(torch.stack([others, sums])), others)
