"""The compiled operators against their plain twins, in each instruction set this processor has."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_deft.objectives import parse
from megatron_deft.ops import native, reference
from tests.oracle import SPECS

pytestmark = pytest.mark.filterwarnings("error")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULP = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
DEFT = parse("deft").gate(1000)


def test_the_extension_is_built_and_chosen() -> None:
    from megatron_deft import ops

    assert native.devices()[0] == "cpu"
    assert ops.implementation(torch.device("cpu")) is native


def inputs(
    columns: int, valid: int, dtype: torch.dtype, start: int = 0, rows: int = 13
) -> tuple[Tensor, Tensor, int, int, int]:
    generator = torch.Generator().manual_seed(columns)
    logits = (torch.randn(rows, columns, generator=generator) * 5).to(dtype)
    logits[:, valid:] = math.nan
    labels = start + torch.randint(-3, columns + 3, (rows,), generator=generator)
    labels[4 % rows] = -100
    return logits, labels, start, valid, -100


# the last ones are cut into segments: several threads share a row
SHAPES = [(1, 1), (2, 1), (31, 31), (33, 30), (512, 512), (513, 511), (5003, 5000), (8, 0)]
SHAPES += [(32768, 32768), (70001, 69999), (300_000, 299_999)]


@pytest.mark.parametrize("topk", [0, 1, 20, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "valid"), SHAPES)
def test_row_stats(columns: int, valid: int, dtype: torch.dtype, topk: int) -> None:
    arguments = (*inputs(columns, valid, dtype, start=100), topk)
    got, want = native.row_stats(*arguments), reference.row_stats(*arguments)
    assert got.shape == (5 + topk, 13)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[4:], want[4:])
    torch.testing.assert_close(got[1:4], want[1:4], rtol=2e-6, atol=1e-6)
    assert bool((got[:, 4] == 0).all())


@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "two values", "minus inf"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_in_any_order(order: str, dtype: torch.dtype) -> None:
    z = {
        "ascending": torch.linspace(-9, 9, 3000),
        "descending": torch.linspace(9, -9, 3000),
        "equal": torch.full((3000,), -2.5),
        "two values": (torch.arange(3000) % 2).float(),
        "minus inf": torch.full((3000,), -math.inf).index_fill(0, torch.tensor([7, 2999]), -3.0),
    }[order]
    arguments = (z.to(dtype)[None], torch.tensor([5]), 0, 3000, -100, 20)
    assert torch.equal(native.row_stats(*arguments)[5:], reference.row_stats(*arguments)[5:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [-3.0, -1e4, 1e4])
def test_all_logits_of_one_sign(dtype: torch.dtype, value: float) -> None:
    """The bf16 maximum is found on integers, where negative numbers are ordered backwards."""
    z = (value + torch.linspace(0, 1, 4001) * value / 10).to(dtype)[None]
    arguments = (z, torch.tensor([5]), 0, 4001, -100)
    got, want = native.row_stats(*arguments), reference.row_stats(*arguments)
    assert got[0] == z.float().max()
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 31, 2047, 2048, 2999])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_nan_is_never_lost(dtype: torch.dtype, at: int, sign: float) -> None:
    for rest in (1.0, -math.inf):
        z = torch.full((1, 3000), rest).to(dtype)
        z[0, at] = math.copysign(math.nan, sign)
        stats = native.row_stats(z, torch.tensor([5]), 0, 3000, -100)
        assert bool(stats[1:4].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 32, 33, 64, 2048])
def test_a_row_of_nan_gives_nan(columns: int, dtype: torch.dtype) -> None:
    z = torch.full((1, columns), math.nan).to(dtype)
    stats, grad = native.row_stats_grad(z, torch.tensor([0]), DEFT, columns, -100)
    assert bool(stats[:5].isnan().all())
    assert bool(grad.isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "valid"), SHAPES)
def test_gate_grad_writes_every_element(columns: int, valid: int, dtype: torch.dtype) -> None:
    logits, labels, start, valid, ignore = inputs(columns, valid, dtype, start=7)
    rows = [torch.rand(13) + 0.5 for _ in range(2)]
    row_max = logits[:, :valid].float().amax(-1) if valid else torch.zeros(13)
    arguments = (labels, row_max, *rows, start, valid, ignore)
    want = reference.gate_grad(logits, *arguments)
    got = native.gate_grad(logits, *arguments)
    torch.testing.assert_close(got, want, rtol=ULP[dtype], atol=1e-7)
    assert not got.isnan().any()
    native.gate_grad_(logits, *arguments)
    assert torch.equal(logits, got)


@pytest.mark.parametrize("rows", [2, 13])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "valid"), [s for s in SHAPES if s[1]])
def test_single_read_equals_two_passes(
    columns: int, valid: int, dtype: torch.dtype, rows: int
) -> None:
    logits, labels, _, valid, ignore = inputs(columns, valid, dtype, rows=rows)
    labels.masked_fill_(labels != ignore, valid - 1)
    stats, grad = native.row_stats_grad(logits, labels, DEFT, valid, ignore)
    assert torch.equal(stats, native.row_stats(logits, labels, 0, valid, ignore))
    want_stats, want = reference.row_stats_grad(logits, labels, DEFT, valid, ignore)
    torch.testing.assert_close(stats, want_stats, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(grad, want, rtol=4 * ULP[dtype], atol=1e-6)
    in_place = native.row_stats_grad_(logits, labels, DEFT, valid, ignore)
    assert torch.equal(in_place, stats)
    assert torch.equal(logits, grad)


@pytest.mark.parametrize("spec", SPECS)
def test_gates_in_numbers_are_the_objectives_gates(spec: str) -> None:
    """csrc/gate.h, the plain twin and the objectives' own functions agree."""
    from megatron_deft import token_loss

    gate = parse(spec).gate(257)
    if gate is None:
        assert parse(spec).batch_mean
        return
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 257, generator=generator) * torch.linspace(0.01, 12, 40)[:, None]
    labels = torch.where(torch.arange(40) % 2 == 0, logits.argmax(-1), torch.arange(40))
    _, stats = token_loss(logits, labels, spec, return_stats=True)
    off = ~torch.nn.functional.one_hot(labels, 257).bool()
    for ops in (native, reference):
        grad = ops.row_stats_grad(logits, labels, gate, 257, -100)[1]
        measured = (grad * off).sum(-1) / (logits.softmax(-1) * off).sum(-1)
        torch.testing.assert_close(measured, stats.gate, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ops", [native, reference])
def test_scale_rows_touches_only_what_it_must(ops: Any, dtype: torch.dtype) -> None:
    grad = torch.randn(6, 77).to(dtype)
    grad[1] = math.nan  # ignored
    grad[2] = math.inf  # factor 0
    labels = torch.tensor([0, -100, 0, 0, 0, 0])
    factor = torch.tensor([1.0, 3.0, 0.0, 0.3, -2.0, math.nan])
    got = grad.clone()
    ops.scale_rows_(got, labels, factor, -100)
    torch.testing.assert_close(got[:2], grad[:2], rtol=0, atol=0, equal_nan=True)
    assert bool((got[2] == 0).all())
    assert torch.equal(got[3:5], (grad[3:5].float() * factor[3:5, None]).to(dtype))
    assert bool(got[5].isnan().all())


@pytest.mark.parametrize("width", [1, 7, 8, 24])
def test_labels_at_every_border_belong_to_one_shard(width: int) -> None:
    vocab = 21  # the last shards hold padding
    logits = torch.randn(vocab, 24)
    labels = torch.arange(vocab)
    ones = torch.ones(vocab)
    row_max, target = logits[:, :vocab].amax(-1), torch.full((vocab,), -7.0)
    found, grads = torch.zeros(vocab), []
    for start in range(0, 24, width):
        shard = logits[:, start : start + width]
        valid = min(max(vocab - start, 0), width)
        found += native.row_stats(shard, labels, start, valid, -100)[4]
        grads.append(native.gate_grad(shard, labels, row_max, ones, target, start, valid, -100))
    assert torch.equal(found, logits[labels, labels])
    grad = torch.cat(grads, 1)
    assert torch.equal(grad == -7, torch.nn.functional.one_hot(labels, 24).bool())
    assert bool((grad[:, vocab:] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_beyond_two_to_the_31_elements(dtype: torch.dtype) -> None:
    """Rows far apart in memory that is reserved, and touched only where a row lies."""
    stride = 2**30 + 8
    storage = torch.empty(2 * stride + 100, dtype=dtype)
    logits = storage.as_strided((3, 100), (stride, 1))
    logits.copy_(torch.randn(3, 100))
    labels, near = torch.tensor([3, -100, 99]), logits.contiguous()
    for arguments in ((0, 100, -100, 5), (0, 97, -100)):
        far = native.row_stats(logits, labels, *arguments)
        assert torch.equal(far, native.row_stats(near, labels, *arguments))
    native.row_stats_grad_(near, labels, DEFT, 100, -100)
    native.row_stats_grad_(logits, labels, DEFT, 100, -100)
    assert torch.equal(logits, near)
    native.scale_rows_(logits, labels, torch.tensor([1.0, 0.0, 0.5]), -100)
    assert torch.equal(logits[:2], near[:2])
    assert torch.equal(logits[2], near[2] / 2)


@pytest.mark.parametrize("shape", [(0, 7), (7, 0), (0, 0), (2, 0, 3)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    logits = torch.zeros(shape)
    labels = torch.zeros(shape[:-1]).long()
    rows = labels.numel()
    stats, grad = native.row_stats_grad(logits, labels, DEFT, shape[-1], -100)
    assert stats.shape == (5, rows)
    assert grad.shape == shape
    assert native.row_stats(logits, labels, 0, shape[-1], -100, 20).shape == (25, rows)
    native.scale_rows_(logits, labels, torch.full((rows,), 0.5), -100)
    per_row = torch.ones(rows)
    native.gate_grad_(logits, labels, per_row, per_row, per_row, 0, shape[-1], -100)


def test_exp_is_accurate_over_its_whole_range() -> None:
    """Through gate_grad with scale 1: out = exp(z - m)."""
    z = torch.linspace(-87.2, 0, 300001)[None]
    zero = torch.zeros(1)
    got = native.gate_grad(z, torch.tensor([-1]), zero, zero + 1, zero, 0, z.shape[1], -100)
    want = z.double().exp()
    assert ((got.double() - want).abs() / want).max().item() < 2e-7


def test_same_bits_from_run_to_run_and_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        for rows in (2, 13):
            arguments = inputs(70001, 70000, torch.bfloat16, rows=rows)
            results = []
            for n in (1, 2, 3, 1):
                torch.set_num_threads(n)
                results.append(native.row_stats(*arguments, 20))
            assert all(torch.equal(results[0], other) for other in results)
    finally:
        torch.set_num_threads(threads)


def test_torch_s_threads_are_used() -> None:
    """The extension must share torch's OpenMP: a second one would not know set_num_threads."""
    code = (
        "import torch, os; from megatron_deft.ops import native;"
        "torch.set_num_threads(3); z = torch.randn(64, 70000);"
        "native.row_stats(z, torch.zeros(64).long(), 0, 70000, -100);"
        "print(sum('gomp' in line for line in set(l.split()[-1] for l in open('/proc/self/maps'))),"
        "len(os.listdir('/proc/self/task')))"
    )
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    runtimes, threads = run({}, code).stdout.split()
    assert int(runtimes) <= 1
    assert int(threads) >= 3


OPCHECK = ["row_stats", "gate_grad", "gate_grad_", "row_stats_grad", "row_stats_grad_"]


@pytest.mark.parametrize("op", [*OPCHECK, "scale_rows_"])
def test_opcheck(op: str) -> None:
    logits, labels, start, valid, ignore = inputs(33, 30, torch.float32)
    rows = [torch.rand(13) for _ in range(3)]
    clean = logits.nan_to_num()
    gate = list(parse("eaft").gate(30))
    arguments: dict[str, tuple[Any, ...]] = {
        "row_stats": (logits, labels, start, valid, ignore, 20),
        "gate_grad": (logits, labels, *rows, start, valid, ignore),
        "gate_grad_": (clean, labels, *rows, start, valid, ignore),
        "row_stats_grad": (logits, labels, gate, valid, ignore),
        "row_stats_grad_": (clean, labels, gate, valid, ignore),
        "scale_rows_": (clean, labels, rows[0], ignore),
    }
    torch.library.opcheck(
        getattr(torch.ops.megatron_deft, op).default,
        arguments[op],
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize(
    ("error", "named", "change"),
    [
        (TypeError, "float32, bfloat16 or float16", {"logits": torch.zeros(3, 4).double()}),
        (ValueError, "without its last dimension", {"labels": torch.zeros(2).long()}),
        (TypeError, "int64", {"labels": torch.zeros(3).int()}),
        (ValueError, "0 to V_local = 4", {"valid": 5}),
        (ValueError, "stride 1", {"logits": torch.zeros(4, 3).t()}),
        (ValueError, "topk: expected 0 to 32, got 33", {"topk": 33}),
    ],
)
def test_bad_input(error: type[Exception], named: str, change: dict[str, Any]) -> None:
    given = {"logits": torch.zeros(3, 4), "labels": torch.zeros(3).long(), "valid": 4, "topk": 0}
    given |= change
    with pytest.raises(error, match=named):
        native.row_stats(given["logits"], given["labels"], 0, given["valid"], -100, given["topk"])


@pytest.mark.parametrize(
    "rows",
    [
        lambda: torch.zeros(1, 8).expand(3, 8),
        lambda: torch.zeros(30).as_strided((3, 8), (4, 1)),
        lambda: torch.zeros(60).as_strided((2, 3, 8), (8, 8, 1)),
    ],
)
def test_rows_that_overlap_are_not_written(rows: Callable[[], torch.Tensor]) -> None:
    logits = rows()
    labels = torch.zeros(logits.shape[:-1]).long()
    with pytest.raises(ValueError, match="expected rows that do not overlap"):
        native.row_stats_grad_(logits, labels, DEFT, 8, -100)
    with pytest.raises(ValueError, match="expected rows that do not overlap"):
        native.scale_rows_(logits, labels, torch.ones(labels.numel()), -100)


def test_a_gate_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="the 8 numbers"):
        native.row_stats_grad(torch.zeros(1, 4), torch.zeros(1).long(), [1.0], 4, -100)


def run(environment: dict[str, str], code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_the_reference_can_be_forced_and_gives_the_same() -> None:
    code = (
        "import torch; from megatron_deft import token_loss, ops;"
        "torch.manual_seed(0); z = torch.randn(4, 99, requires_grad=True);"
        "token_loss(z, torch.arange(4)).sum().backward();"
        "print(ops.implementation(z.device).__name__, z.grad.double().norm().item())"
    )
    native_run, reference_run = (
        run({"MEGATRON_DEFT_OPS": mode}, code) for mode in ("native", "reference")
    )
    name, norm = native_run.stdout.split()
    other_name, other_norm = reference_run.stdout.split()
    assert (name, other_name) == ("megatron_deft.ops.native", "megatron_deft.ops.reference")
    assert math.isclose(float(norm), float(other_norm), rel_tol=1e-6)


def test_an_unknown_mode_names_the_legal_ones() -> None:
    code = "import torch; from megatron_deft import ops; ops.implementation(torch.device('cpu'))"
    done = run({"MEGATRON_DEFT_OPS": "fast"}, code)
    assert "legal are auto, native, reference" in done.stderr


def test_an_unknown_instruction_set_is_one_line_with_the_legal_ones() -> None:
    code = "import sys; from megatron_deft.cli import main; sys.exit(main(['doctor']))"
    done = run({"MEGATRON_DEFT_CPU": "sse"}, code)
    assert done.returncode == 2
    assert "error: MEGATRON_DEFT_CPU=sse: legal on this processor: " in done.stderr
    assert done.stderr.strip().endswith("plain")
    assert "Traceback" not in done.stderr


KERNELS = (
    "test_row_stats or largest or one_sign or nan or writes_every or single_read or scale or exp_is"
)


@pytest.mark.skipif("MEGATRON_DEFT_CPU" in os.environ, reason="is itself such a run")
@pytest.mark.parametrize("name", ["avx512", "avx2", "plain"])
def test_every_instruction_set_passes_these_tests(name: str) -> None:
    probe = "import torch; from megatron_deft import _C; print(_C.instruction_set())"
    best = run({}, probe).stdout.strip()
    if name == best:
        return  # what the other tests of this file ran
    forced = run({"MEGATRON_DEFT_CPU": name}, probe)
    if name == "avx512" or (name == "avx2" and best == "plain"):
        assert f"MEGATRON_DEFT_CPU={name}: legal on this processor: {best}" in forced.stderr
        return
    assert forced.stdout.strip() == name
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", KERNELS, __file__],
        env={**os.environ, "MEGATRON_DEFT_CPU": name},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
