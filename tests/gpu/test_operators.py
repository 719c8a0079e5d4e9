"""The CUDA operators against their plain twins and float64; skipped without a GPU."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from megatron_deft import token_loss
from megatron_deft.ops import native, reference
from tests.oracle import SPECS, loss_and_grad

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
IGNORE = -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# one unit in the last place, where it is largest: a value near a tie may round either way
ULP = {torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DEFT = [1.0, 0.0, 1e-6, -math.inf, math.inf, 0.0, 1.0, 0.0]
EAFT = [0.0, 0.0, 0.0, -math.inf, math.inf, 1.0, 3.0, 20.0]
# rows, columns, valid: a warp for a row, a block, clusters of 2 to 8, rows too long to stay on chip
SHAPES = [(13, 1, 1), (13, 7, 7), (13, 33, 30), (13, 1000, 999), (257, 5003, 5000)]
SHAPES += [(40, 32000, 32000), (600, 50257, 50257), (9, 128256, 128000), (300, 152064, 151936)]
SHAPES += [(3, 300001, 299999), (3, 1000003, 1000001)]


def inputs(n: int, columns: int, valid: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits with nan in the padding and in ignored rows; labels in and around the vocabulary."""
    generator = torch.Generator(device="cuda").manual_seed(columns)
    logits = torch.randn(n, columns, generator=generator, device="cuda").mul_(4).to(dtype)
    labels = torch.randint(0, max(valid, 1), (n,), generator=generator, device="cuda")
    labels[0] = valid - 1
    labels[1 % n] = 0
    labels[2 % n] = IGNORE
    logits[:, valid:] = math.nan
    logits[labels == IGNORE] = math.nan
    return logits, labels


def poison(*shape: int, dtype: torch.dtype = torch.float32) -> None:
    """Leave nan in the memory that the next allocation of this size is given."""
    torch.full(shape, math.nan, dtype=dtype, device="cuda")


def check_stats(got: Tensor, logits: Tensor, labels: Tensor, valid: int, topk: int = 0) -> None:
    kept = labels != IGNORE
    want = reference.row_stats(logits, labels, 0, valid, IGNORE, topk)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[4:], want[4:])
    assert not got[:, ~kept].any()
    for row in kept.nonzero()[:, 0].tolist():
        z = logits[row, :valid].double()
        d = z - z.max()
        e = d.exp()
        exact = torch.stack([e.sum() - 1, e.square().sum(), (e * d).sum()])
        torch.testing.assert_close(got[1:4, row].double(), exact, rtol=2e-6, atol=1e-7)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_extension_has_cuda_kernels() -> None:
    assert "cuda" in native.devices(), native.missing("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "columns", "valid"), SHAPES)
def test_row_stats(n: int, columns: int, valid: int, dtype: torch.dtype) -> None:
    logits, labels = inputs(n, columns, valid, dtype)
    for topk in (0, 20):
        poison(5 + topk, n)
        got = native.row_stats(logits, labels, 0, valid, IGNORE, topk)
        check_stats(got, logits, labels, valid, topk)


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards(dtype: torch.dtype) -> None:
    """Labels of other shards, of none, and a shard of padding alone."""
    logits, _ = inputs(6, 64, 64, dtype)
    logits.nan_to_num_(0.5)
    labels = torch.tensor([999, 1000, 1059, 1060, -(2**62), 2**62]).cuda()
    for valid in (60, 0):
        arguments = (logits, labels, 1000, valid, IGNORE, 20)
        got, want = native.row_stats(*arguments), reference.row_stats(*arguments)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
        rows = (want[0].nan_to_num(), torch.rand(6).cuda(), torch.rand(6).cuda())
        arguments = (logits, labels, *rows, 1000, valid, IGNORE)
        got, want = native.gate_grad(*arguments), reference.gate_grad(*arguments)
        torch.testing.assert_close(got, want, rtol=ULP[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "columns", "valid"), SHAPES)
def test_gate_grad(n: int, columns: int, valid: int, dtype: torch.dtype) -> None:
    logits, labels = inputs(n, columns, valid, dtype)
    row_max = logits[:, :valid].amax(-1).float().nan_to_num()
    arguments = (labels, row_max, torch.rand(n).cuda(), torch.rand(n).cuda(), 0, valid, IGNORE)
    want = reference.gate_grad(logits, *arguments)
    poison(n, columns, dtype=dtype)
    got = native.gate_grad(logits, *arguments)
    torch.testing.assert_close(got, want, rtol=ULP[dtype], atol=1e-7)
    native.gate_grad_(logits, *arguments)
    assert torch.equal(logits, got)


@pytest.mark.parametrize("gate", [DEFT, EAFT], ids=["deft", "eaft"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "columns", "valid"), SHAPES)
def test_row_stats_grad(
    n: int, columns: int, valid: int, dtype: torch.dtype, gate: list[float]
) -> None:
    logits, labels = inputs(n, columns, valid, dtype)
    poison(n, columns, dtype=dtype)
    stats, got = native.row_stats_grad(logits, labels, gate, valid, IGNORE)
    check_stats(stats, logits, labels, valid, int(gate[7]))
    want = reference.row_stats_grad(logits, labels, gate, valid, IGNORE)[1]
    torch.testing.assert_close(got, want, rtol=2 * ULP[dtype], atol=1e-6)
    in_place = native.row_stats_grad_(logits, labels, gate, valid, IGNORE)
    assert torch.equal(in_place, stats)
    assert torch.equal(logits, got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1000, 1001, 152065])
def test_views(columns: int, dtype: torch.dtype) -> None:
    """Rows inside a larger storage: any alignment, and nothing outside is written."""
    for offset, gap in [(0, 8), (1, 0), (3, 1), (8, 7)]:
        storage = torch.randn(6 * (columns + gap) + offset, device="cuda").to(dtype)
        logits = storage.as_strided(
            (2, 3, columns), (3 * (columns + gap), columns + gap, 1), offset
        )
        labels = torch.tensor([[0, columns - 1, IGNORE], [1, 7, columns // 2]]).cuda()
        want_stats, want = reference.row_stats_grad(logits, labels, DEFT, columns, IGNORE)
        stats, got = native.row_stats_grad(logits, labels, DEFT, columns, IGNORE)
        torch.testing.assert_close(stats, want_stats, rtol=5e-6, atol=1e-6)
        torch.testing.assert_close(got, want, rtol=2 * ULP[dtype], atol=1e-6)
        before = storage.clone()
        native.row_stats_grad_(logits, labels, DEFT, columns, IGNORE)
        assert torch.equal(logits, got)
        logits.copy_(before.as_strided(logits.shape, logits.stride(), offset))
        assert torch.equal(storage, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_peculiar_rows(dtype: torch.dtype) -> None:
    n = 70001
    some = torch.full((n,), -math.inf).index_fill(0, torch.tensor([7, n - 2]), -3.0)
    values = [torch.linspace(-9, 9, n), torch.linspace(9, -9, n), torch.full((n,), -2.5)]
    values += [(torch.arange(n) % 2).float(), some, torch.full((n,), -math.inf)]
    values += [torch.full((n,), 1e4), torch.full((n,), -1e4), torch.randn(n) * 1e3]
    values += [torch.full((n,), -1e4).index_fill(0, torch.tensor([1234]), 1e4)]
    logits = torch.stack(values).to(dtype).cuda()
    labels = torch.arange(len(values)).cuda()
    for topk in (0, 1, 20, 32):
        arguments = (logits, labels, 0, n, IGNORE, topk)
        got, want = native.row_stats(*arguments), reference.row_stats(*arguments)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[4:], want[4:])
        torch.testing.assert_close(got[1:4], want[1:4], rtol=5e-6, atol=1e-6)
    for at in (0, 1, 40000, n - 1):
        broken = torch.ones(2, n, dtype=dtype, device="cuda")
        broken[1] = -math.inf
        broken[:, at] = math.nan
        stats = native.row_stats(broken, labels[:2], 0, n, IGNORE)
        assert bool(stats[1:4].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [77, 40001])
def test_scale_rows_touches_only_what_it_must(columns: int, dtype: torch.dtype) -> None:
    grad = torch.randn(6, columns).to(dtype)
    grad[1], grad[2] = math.nan, math.inf  # ignored; factor 0
    labels = torch.tensor([0, IGNORE, 0, 0, 0, 0])
    factor = torch.tensor([1.0, 3.0, 0.0, 0.3, -2.0, math.nan])
    want = grad.clone()
    reference.scale_rows_(want, labels, factor, IGNORE)
    got = grad.cuda()
    native.scale_rows_(got, labels.cuda(), factor.cuda(), IGNORE)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


def test_more_than_2_to_the_31_elements() -> None:
    n, columns = 16500, 131072
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    logits = torch.randn(n, columns, dtype=torch.bfloat16, device="cuda")
    labels = torch.arange(n, device="cuda")
    last = slice(n - 3, n)
    want_stats, want = reference.row_stats_grad(logits[last], labels[last], DEFT, columns, IGNORE)
    stats = native.row_stats(logits, labels, 0, columns, IGNORE)
    torch.testing.assert_close(stats[:, last], want_stats, rtol=5e-6, atol=1e-6)
    again = native.row_stats_grad_(logits, labels, DEFT, columns, IGNORE)
    torch.testing.assert_close(again, stats, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(logits[last], want, rtol=2**-6, atol=1e-6)
    factor = torch.where(labels < n - 1, 1.0, 0.0)
    native.scale_rows_(logits, labels, factor, IGNORE)
    assert not logits[-1].any()
    torch.testing.assert_close(logits[n - 3 : n - 1], want[:2], rtol=2**-6, atol=1e-6)
    rows = (torch.zeros(n).cuda(), torch.ones(n).cuda(), torch.full((n,), 2.0).cuda())
    native.gate_grad_(logits, labels, *rows, 0, columns, IGNORE)
    assert logits[-1, n - 1] == 2
    assert logits[-1].sum(dtype=torch.float32) == columns + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_from_run_to_run(dtype: torch.dtype) -> None:
    logits, labels = inputs(200, 152064, 151936, dtype)
    stats, grad = native.row_stats_grad(logits, labels, EAFT, 151936, IGNORE)
    apart = native.row_stats(logits, labels, 0, 151936, IGNORE, 20)
    for _ in range(10):
        stats_again, grad_again = native.row_stats_grad(logits, labels, EAFT, 151936, IGNORE)
        assert torch.equal(stats_again, stats)
        assert torch.equal(grad_again, grad)
        assert torch.equal(native.row_stats(logits, labels, 0, 151936, IGNORE, 20), apart)


def every_operator(logits: Tensor, labels: Tensor, factor: Tensor) -> list[Tensor]:
    """Each operator once, without a transfer between host and device."""
    valid = logits.shape[-1]
    stats = native.row_stats(logits, labels, 0, valid, IGNORE, 20)
    rows = (stats[0], 1 / (1 + stats[1]), -torch.ones_like(stats[1]))
    grad = native.gate_grad(logits, labels, *rows, 0, valid, IGNORE)
    both = native.row_stats_grad(logits, labels, EAFT, valid, IGNORE)
    in_place, over = logits.clone(), logits.clone()
    native.gate_grad_(in_place, labels, *rows, 0, valid, IGNORE)
    native.row_stats_grad_(over, labels, DEFT, valid, IGNORE)
    native.scale_rows_(over, labels, factor, IGNORE)
    return [stats, grad, *both, in_place, over]


def test_any_stream_and_no_synchronisation() -> None:
    logits, labels = inputs(70, 128256, 128256, torch.bfloat16)
    factor = torch.rand(70, device="cuda")
    want = every_operator(logits, labels, factor)
    late = torch.full_like(logits, math.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with no_synchronisation(), torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # what runs on another stream sees nan
        late.copy_(logits)
        got = every_operator(late, labels, factor)
    side.synchronize()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def check_capture(run: Callable[[Tensor], list[Tensor]], logits: Tensor) -> None:
    """A graph captured over one input gives another's results when that is copied in."""
    other = logits.flip(0).contiguous()
    want = run(other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(logits)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(logits)
    logits.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_graph_capture_of_the_operators() -> None:
    logits, labels = inputs(70, 128256, 128256, torch.bfloat16)
    factor = torch.rand(70, device="cuda")
    check_capture(lambda z: every_operator(z, labels, factor), logits)


@pytest.mark.parametrize("grad_in_forward", [False, True])
@pytest.mark.parametrize("spec", ["deft", "eaft", "nll"])
def test_graph_capture_of_token_loss(spec: str, grad_in_forward: bool) -> None:
    logits, _ = inputs(64, 32000, 32000, torch.bfloat16)
    logits.nan_to_num_(0.0)
    labels = torch.arange(64, device="cuda")
    labels[5] = IGNORE

    def step(z: Tensor) -> list[Tensor]:
        leaf = z.detach().requires_grad_(True)
        loss = token_loss(leaf, labels, spec, grad_in_forward=grad_in_forward)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        return [loss.detach(), grad]

    check_capture(step, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_token_loss_against_float64(spec: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(24, 512, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, 507, (24,), generator=generator)
    labels[1::5] = IGNORE
    want, want_grad, keep, _ = loss_and_grad(spec, logits, labels, 507, torch.ones(24))
    leaf = logits.cuda().requires_grad_(True)
    loss, stats = token_loss(leaf, labels.cuda(), spec, vocab_size=507, return_stats=True)
    loss.sum().backward()
    assert torch.equal(stats.keep.cpu(), keep)
    torch.testing.assert_close(loss.detach().cpu().double(), want, rtol=1e-5, atol=2e-6)
    assert leaf.grad is not None
    ulp = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(leaf.grad.cpu().double(), want_grad, rtol=1.01 * ulp, atol=1e-6)
