"""The compiled operators against their plain twins."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_deft.ops import native, reference

pytestmark = pytest.mark.filterwarnings("error")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_extension_is_built_and_chosen() -> None:
    from megatron_deft import ops

    assert native.devices()[0] == "cpu"
    assert ops.implementation(torch.device("cpu")) is native


def inputs(
    columns: int, valid: int, dtype: torch.dtype, start: int = 0
) -> tuple[Tensor, Tensor, int, int, int]:
    generator = torch.Generator().manual_seed(columns)
    logits = (torch.randn(13, columns, generator=generator) * 5).to(dtype)
    logits[:, valid:] = math.nan
    labels = start + torch.randint(-3, columns + 3, (13,), generator=generator)
    labels[4] = -100
    return logits, labels, start, valid, -100


SHAPES = [(1, 1), (2, 1), (31, 31), (33, 30), (512, 512), (513, 511), (5003, 5000), (8, 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "valid"), SHAPES)
def test_row_stats(columns: int, valid: int, dtype: torch.dtype) -> None:
    arguments = inputs(columns, valid, dtype, start=100)
    got, want = native.row_stats(*arguments), reference.row_stats(*arguments)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[4], want[4])
    torch.testing.assert_close(got[1:4], want[1:4], rtol=2e-6, atol=1e-6)
    assert bool((got[:, 4] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "valid"), SHAPES)
def test_row_topk(columns: int, valid: int, dtype: torch.dtype) -> None:
    logits, labels, _, _, ignore = inputs(columns, valid, dtype)
    got = native.row_topk(logits, labels, 20, valid, ignore)
    assert torch.equal(got, reference.row_topk(logits, labels, 20, valid, ignore))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "valid"), SHAPES)
def test_gate_grad_writes_every_element(columns: int, valid: int, dtype: torch.dtype) -> None:
    logits, labels, start, valid, ignore = inputs(columns, valid, dtype, start=7)
    rows = [torch.rand(13) + 0.5 for _ in range(2)]
    row_max = logits[:, :valid].float().amax(-1) if valid else torch.zeros(13)
    arguments = (labels, row_max, *rows, start, valid, ignore)
    want = reference.gate_grad(logits, *arguments)
    got = native.gate_grad(logits, *arguments)
    ulp = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(got, want, rtol=ulp, atol=1e-7)
    assert not got.isnan().any()
    native.gate_grad_(logits, *arguments)
    assert torch.equal(logits, got)


def test_exp_is_accurate_over_its_whole_range() -> None:
    """Through gate_grad with scale 1: out = exp(z - m)."""
    z = torch.linspace(-87.2, 0, 300001)[None]
    zero = torch.zeros(1)
    got = native.gate_grad(z, torch.tensor([-1]), zero, zero + 1, zero, 0, z.shape[1], -100)
    want = z.double().exp()
    assert ((got.double() - want).abs() / want).max().item() < 2e-7


def test_same_bits_from_run_to_run_and_for_any_number_of_threads() -> None:
    arguments = inputs(5003, 5000, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            results.append(native.row_stats(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("op", ["row_stats", "gate_grad", "gate_grad_", "row_topk"])
def test_opcheck(op: str) -> None:
    logits, labels, start, valid, ignore = inputs(33, 30, torch.float32)
    rows = [torch.rand(13) for _ in range(3)]
    arguments: dict[str, tuple[Any, ...]] = {
        "row_stats": (logits, labels, start, valid, ignore),
        "row_topk": (logits, labels, 20, valid, ignore),
        "gate_grad": (logits, labels, *rows, start, valid, ignore),
        "gate_grad_": (logits.nan_to_num(), labels, *rows, start, valid, ignore),
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
    ],
)
def test_bad_input(error: type[Exception], named: str, change: dict[str, Any]) -> None:
    given = {"logits": torch.zeros(3, 4), "labels": torch.zeros(3).long(), "valid": 4} | change
    with pytest.raises(error, match=named):
        native.row_stats(given["logits"], given["labels"], 0, given["valid"], -100)


def run(mode: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MEGATRON_DEFT_OPS": mode},
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
    native_run, reference_run = run("native", code), run("reference", code)
    name, norm = native_run.stdout.split()
    other_name, other_norm = reference_run.stdout.split()
    assert (name, other_name) == ("megatron_deft.ops.native", "megatron_deft.ops.reference")
    assert math.isclose(float(norm), float(other_norm), rel_tol=1e-6)


def test_an_unknown_mode_names_the_legal_ones() -> None:
    code = "import torch; from megatron_deft import ops; ops.implementation(torch.device('cpu'))"
    assert "legal are auto, native, reference" in run("fast", code).stderr
