"""The CUDA kernels run: their sources, compiled for the CPU against tests/csrc/emulator.

Threads are fibers that take turns in several orders: a missing barrier changes bits or deadlocks,
and the sanitizers watch every access. What an emulator cannot show, tests/gpu does.
"""

import dataclasses
import math
import shutil
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_deft.ops import reference
from tests.csrc.emulated import (
    CXX,
    DEFT,
    DTYPES,
    EAFT,
    IGNORE,
    ORDERS,
    Case,
    Result,
    Rows,
    bits,
    build,
    poisoned,
    rows,
    run,
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(CXX) is None, reason="needs Linux and a C++ compiler"
)
Run = Callable[..., list[Result]]  # of cases, and of the machine
# (columns, valid, gap between rows, offset): unaligned heads and tails in every type
SHAPES = [(1, 1, 0, 0), (2, 1, 1, 3), (7, 7, 0, 1), (31, 30, 0, 0), (33, 33, 0, 5), (8, 0, 0, 0)]
SHAPES += [(257, 250, 3, 1), (1000, 999, 0, 0), (4099, 4099, 2, 7)]
# one unit in the last place, where it is largest: a value near a tie may round either way
ULP = {torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(scope="module")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("emulated")
    program = build(folder)
    return lambda cases, **machine: run(program, folder, cases, **machine)


def some_rows(
    columns: int, valid: int, gap: int, offset: int, dtype: torch.dtype, n: int = 3
) -> tuple[Rows, Tensor]:
    """Rows with nan in the padding, the second ignored and all nan; labels at the borders."""
    generator = torch.Generator().manual_seed(columns)
    values = torch.randn(n, columns, generator=generator) * 4
    values[:, valid:] = math.nan
    labels = torch.tensor([0, IGNORE, valid - 1, valid, -1, 10**12])[:n]
    values[labels == IGNORE] = math.nan
    return rows(values.to(dtype), gap, offset), labels


def out_rows(logits: Rows, gap: int, offset: int) -> Rows:
    n, columns = logits.shape
    stride = columns + gap
    storage = poisoned(offset + (n - 1) * stride + columns, logits.storage.dtype)
    return Rows(storage, logits.shape, stride, offset)


def float64_sums(z: Tensor) -> Tensor:
    """S1 - 1, S2, Sh of each row."""
    z = z.double()
    m, largest = z.max(-1, keepdim=True)
    d = (z - m).masked_fill(z == -math.inf, -math.inf)
    e = d.exp()
    others = e.scatter(1, largest, 0.0).sum(-1) - (m[:, 0] == -math.inf).double()
    others = others + 0.0 * e.sum(-1)  # nan stays nan
    return torch.stack([others, e.square().sum(-1), (e * d).masked_fill(e == 0, 0.0).sum(-1)])


def check_stats(case: Case, got: Tensor) -> None:
    valid = case.logits.shape[1] if case.valid < 0 else case.valid
    want = reference.row_stats(case.logits.view, case.labels, case.start, valid, IGNORE, case.topk)
    assert torch.equal(got[0], want[0]), case
    assert torch.equal(got[4:], want[4:]), case
    exact = want[1:4].double()
    kept = case.labels != IGNORE
    if valid > 0:
        exact[:, kept] = float64_sums(case.logits.view[kept, :valid])
    torch.testing.assert_close(got[1:4].double(), exact, rtol=2e-6, atol=2e-7)


def same_bits(case: Case, a: Result, b: Result) -> None:
    for x, y in zip(*((r.stats, r.out.storage, r.logits.storage) for r in (a, b)), strict=True):
        assert torch.equal(bits(x), bits(y))


def in_all_orders(emulate: Run, cases: list[Case]) -> list[Result]:
    """The results in forward order, after the others gave the same bits."""
    given = [dataclasses.replace(c, order=order) for order in ORDERS for c in cases]
    results = emulate(given)
    n = len(cases)
    for i, case in enumerate(given):
        same_bits(case, results[i], results[i % n])
    return results[:n]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topk", [0, 20])
def test_row_stats(emulate: Run, dtype: torch.dtype, topk: int) -> None:
    cases = []
    for shape in SHAPES:
        logits, labels = some_rows(*shape, dtype)
        cases.append(Case("row_stats", logits, labels, valid=shape[1], topk=topk))
    # an empty shard, and labels of other shards
    logits, _ = some_rows(64, 64, 0, 0, dtype, n=6)
    cases.append(Case("row_stats", logits, torch.arange(6), valid=0, topk=topk))
    borders = torch.tensor([999, 1000, 1059, 1060, -(2**62), 2**62])
    logits = rows(torch.randn(6, 64).to(dtype), 1, 1)
    cases.append(Case("row_stats", logits, borders, start=1000, valid=60, topk=topk))
    for case, got in zip(cases, in_all_orders(emulate, cases), strict=True):
        check_stats(case, got.stats)
        assert torch.equal(bits(got.logits.storage), bits(case.logits.storage))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("topk", [0, 7])
def test_row_stats_of_a_cluster(emulate: Run, dtype: torch.dtype, topk: int) -> None:
    cases = []
    for columns, parts, threads in [(4099, 2, 64), (12345, 4, 32), (1000, 8, 32), (5, 8, 64)]:
        logits, labels = some_rows(columns, columns, 1, 3, dtype, n=2)
        cases.append(Case("row_stats", logits, labels, parts=parts, threads=threads, topk=topk))
    for case, got in zip(cases, in_all_orders(emulate, cases), strict=True):
        check_stats(case, got.stats)


@pytest.mark.parametrize("dtype", DTYPES)
def test_peculiar_rows(emulate: Run, dtype: torch.dtype) -> None:
    n = 3001
    some = torch.full((n,), -math.inf).index_fill(0, torch.tensor([7, 2999]), -3.0)
    values = torch.stack(
        [
            torch.linspace(-9, 9, n),
            torch.linspace(9, -9, n),
            torch.full((n,), -2.5),
            (torch.arange(n) % 2).float(),
            some,
            torch.full((n,), -math.inf),
            torch.full((n,), 1e4),
            torch.full((n,), -1e4),
            torch.full((n,), -1e4).index_fill(0, torch.tensor([1234]), 1e4),
            torch.randn(n) * 1e3,
            1e3 + torch.rand(n),
        ]
    ).to(dtype)
    labels = torch.arange(len(values))
    cases = [
        Case("row_stats", rows(values, 0, 1), labels, topk=topk, threads=threads, parts=parts)
        for topk, threads, parts in [(0, 128, 1), (20, 128, 1), (32, 32, 4), (1, 64, 2)]
    ]
    for case, got in zip(cases, emulate(cases), strict=True):
        check_stats(case, got.stats)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_is_never_lost(emulate: Run, dtype: torch.dtype) -> None:
    places = torch.tensor([0, 1, 777, 2999])
    cases = []
    for rest in (1.0, -math.inf):
        values = torch.full((4, 3000), rest)
        values[torch.arange(4), places] = math.nan
        logits = rows(values.to(dtype), 0, 3)
        labels = torch.full((4,), 5)
        cases.append(Case("row_stats", logits, labels, threads=64, parts=2))
        cases.append(Case("row_stats", logits, labels, topk=20))
        cases.append(Case("row_stats_grad", logits, labels))
    for case, got in zip(cases, emulate(cases), strict=True):
        assert bool(got.stats[1:4].isnan().all())
        if case.op == "row_stats_grad":
            assert bool(got.out.view.isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_of_long_rows(emulate: Run, dtype: torch.dtype) -> None:
    """Where far more passes the threshold than the buffer holds, and where little does."""
    n = 20011
    ramp = torch.arange(n) / 4.0
    shuffled = ramp[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    late = torch.where(torch.arange(n) < n - 40, shuffled, ramp + 1e4)
    values = torch.stack([ramp, ramp.flip(0), shuffled, late, (ramp * 4) % 97]).to(dtype)
    labels = torch.arange(5)
    cases = [
        Case("row_stats", rows(values, 1, 0), labels, topk=topk, threads=threads, parts=parts)
        for topk, threads, parts in [(20, 256, 1), (32, 64, 1), (20, 32, 2)]
    ]
    for case, got in zip(cases, emulate(cases), strict=True):
        check_stats(case, got.stats)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_grad(emulate: Run, dtype: torch.dtype) -> None:
    cases = []
    # out aligned as the logits are, and not
    for (columns, valid, gap, offset), (out_gap, out_offset) in [
        *((shape, shape[2:]) for shape in SHAPES),
        *((shape, (1, 2)) for shape in SHAPES),
        ((64, 0, 0, 0), (0, 0)),
        ((40000, 39000, 0, 1), (0, 1)),
    ]:
        logits, labels = some_rows(columns, valid, gap, offset, dtype, n=6 if columns < 99 else 2)
        n = len(labels)
        m = logits.view[:, :valid].float().amax(-1).nan_to_num() if valid else torch.zeros(n)
        per_row = (m, torch.rand(n) + 0.5, torch.rand(n) + 0.5)
        out = out_rows(logits, out_gap, out_offset)
        for to in (out, None):
            cases.append(Case("gate_grad", logits, labels, to, per_row, valid=valid))
            cases.append(dataclasses.replace(cases[-1], threads=32, parts=3))
    results = emulate(cases)
    for i, (case, got) in enumerate(zip(cases, results, strict=True)):
        want = reference.gate_grad(
            case.logits.view, case.labels, *case.per_row, 0, case.valid, IGNORE
        )
        torch.testing.assert_close(got.out.view, want, rtol=ULP[dtype], atol=1e-7)
        assert not got.out.view.isnan().any()
        assert got.out.untouched_outside(case.out or case.logits)
        assert torch.equal(bits(got.out.view), bits(results[i - i % 4].out.view))
        if case.out is not None:
            assert torch.equal(bits(got.logits.storage), bits(case.logits.storage))


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_rows_of_two_strides(emulate: Run, order: str) -> None:
    """Runs of 3 rows, 9 elements further apart than the rows of a run: both kinds of views."""
    columns, gap = 77, 3
    stride = columns + gap
    for run_, strides in ((3, (stride, 3 * stride + 9)), (2, (3 * stride + 9, stride))):
        flat = torch.randn(600)
        values = flat.as_strided((6 // run_, run_, columns), (strides[1], strides[0], 1))
        labels = torch.tensor([0, 5, IGNORE, 70, 3, 76])
        per_row = (values.amax(-1).reshape(-1), torch.rand(6), torch.rand(6))
        layout = {"run": run_, "run_stride": strides[1], "order": order}
        logits = Rows(flat, (6, columns), strides[0], 0)
        out = rows(torch.zeros(6, columns))
        cases = [
            Case("row_stats", logits, labels, **layout),
            Case("gate_grad", logits, labels, out, per_row, **layout),
            Case("row_stats_grad", logits, labels, out, **layout),
            Case("gate_grad", logits, labels, None, per_row, **layout),
            Case("scale_rows", logits, labels, None, per_row[1:2], **layout),
        ]
        flattened = values.reshape(6, columns)
        arguments = (flattened, labels, 0, columns, IGNORE)
        grad = reference.gate_grad(flattened, labels, *per_row, 0, columns, IGNORE)
        scaled = flattened.clone()
        reference.scale_rows_(scaled, labels, per_row[1], IGNORE)
        got = emulate(cases)
        want = reference.row_stats(*arguments)
        torch.testing.assert_close(got[0].stats, want, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(got[1].out.view, grad, rtol=5e-6, atol=1e-7)
        want = reference.row_stats_grad(flattened, labels, DEFT, columns, IGNORE)[1]
        torch.testing.assert_close(got[2].out.view, want, rtol=1e-5, atol=1e-6)
        for result, written in ((got[3], grad), (got[4], scaled)):
            after = result.logits.storage.as_strided(values.shape, values.stride())
            torch.testing.assert_close(after.reshape(6, columns), written, rtol=5e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_rows(emulate: Run, dtype: torch.dtype) -> None:
    cases = []
    for columns, gap, offset in [(1, 0, 0), (77, 0, 1), (512, 1, 3), (20000, 0, 0)]:
        values = torch.randn(6, columns)
        values[1], values[2] = math.nan, math.inf
        labels = torch.tensor([0, IGNORE, 0, 0, 0, 0])
        factor = (torch.tensor([1.0, 3.0, 0.0, 0.3, -2.0, math.nan]),)
        cases.append(Case("scale_rows", rows(values.to(dtype), gap, offset), labels, None, factor))
        cases.append(dataclasses.replace(cases[-1], threads=64, parts=2))
    for case, got in zip(cases, emulate(cases), strict=True):
        want = case.logits.view.clone()
        reference.scale_rows_(want, case.labels, case.per_row[0], IGNORE)
        torch.testing.assert_close(got.out.view, want, rtol=0, atol=0, equal_nan=True)
        assert got.out.untouched_outside(case.logits)


def check_row_stats_grad(case: Case, got: Result) -> None:
    valid = case.logits.shape[1] if case.valid < 0 else case.valid
    check_stats(case, got.stats)
    _, want = reference.row_stats_grad(case.logits.view, case.labels, case.gate, valid, IGNORE)
    ulp = ULP[case.logits.storage.dtype]
    torch.testing.assert_close(got.out.view, want, rtol=2 * ulp, atol=1e-6)
    assert got.out.untouched_outside(case.out or case.logits)
    if case.out is not None:
        assert torch.equal(bits(got.logits.storage), bits(case.logits.storage))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [DEFT, EAFT], ids=["deft", "eaft"])
def test_row_stats_grad(emulate: Run, dtype: torch.dtype, gate: tuple[float, ...]) -> None:
    cases = []
    for shape in SHAPES:
        logits, labels = some_rows(*shape, dtype)
        _, valid, gap, offset = shape
        case = Case("row_stats_grad", logits, labels, valid=valid, gate=gate, topk=int(gate[7]))
        for out in (None, out_rows(logits, gap, offset), out_rows(logits, 1, 2)):
            cases.append(dataclasses.replace(case, out=out))
    results = emulate(cases)
    for i, (case, got) in enumerate(zip(cases, results, strict=True)):
        check_row_stats_grad(case, got)
        assert torch.equal(bits(got.out.view), bits(results[i - i % 3].out.view))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [DEFT, EAFT], ids=["deft", "eaft"])
def test_row_stats_grad_of_a_cluster(
    emulate: Run, dtype: torch.dtype, gate: tuple[float, ...]
) -> None:
    """Every size of cluster, kept on chip by bulk copies or the threads' own, or read again."""
    cases = []
    shapes = [(4099, 1, 64), (2500, 2, 32), (9001, 4, 32), (3001, 8, 32)]
    for columns, parts, threads in shapes if gate == DEFT else shapes[1::2]:
        logits, labels = some_rows(columns, columns - 5, 1, 3, dtype, n=2)
        case = Case(
            "row_stats_grad",
            logits,
            labels,
            valid=columns - 5,
            gate=gate,
            topk=int(gate[7]),
            parts=parts,
            threads=threads,
        )
        for on_chip, bulk in [(True, True), (True, False), (False, True)]:
            for out in (None, out_rows(logits, 1, 3)) if bulk else (None,):
                cases.append(dataclasses.replace(case, out=out, on_chip=on_chip, bulk=bulk))
    results = in_all_orders(emulate, cases)
    for i, (case, got) in enumerate(zip(cases, results, strict=True)):
        check_row_stats_grad(case, got)
        assert torch.equal(bits(got.out.view), bits(results[i - i % 5].out.view))


# a device with clusters; one without, where the row fits on chip or does not
MACHINES = [(227 * 1024, 1), (163 * 1024, 0), (99 * 1024, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shared", "clusters"), MACHINES)
def test_what_the_launchers_choose(
    emulate: Run, dtype: torch.dtype, shared: int, clusters: int
) -> None:
    cases = []
    columns = 70001
    logits, _ = some_rows(columns, columns - 1, 0, 0, dtype, n=1)
    labels = torch.tensor([columns - 2])
    for gate in (DEFT, EAFT):
        case = Case("row_stats", logits, labels, valid=columns - 1, topk=int(gate[7]))
        cases.append(case)
        case = dataclasses.replace(case, op="row_stats_grad", gate=gate, bulk=clusters == 1)
        cases.append(case)
    for case, got in zip(cases, emulate(cases, shared=shared, clusters=clusters), strict=True):
        if case.op == "row_stats_grad":
            check_row_stats_grad(case, got)
        else:
            check_stats(case, got.stats)
