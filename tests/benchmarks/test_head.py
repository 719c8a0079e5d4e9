"""`megatron-deft bench head` at tiny shapes: what it writes and refuses; never how fast it is."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_deft.benchmarks import head_contenders, shared
from megatron_deft.benchmarks.arguments import HEAD_PLANS, HeadPlan, head_plans
from megatron_deft.benchmarks.budgets import judge
from megatron_deft.benchmarks.check import WrongResultError
from megatron_deft.benchmarks.head_budgets import BUDGETS
from megatron_deft.benchmarks.head_check import HeadReference
from megatron_deft.benchmarks.head_contenders import HeadOutcome, Rounding, contenders
from megatron_deft.benchmarks.head_inputs import make_inputs
from megatron_deft.benchmarks.head_report import markdown
from megatron_deft.cli import main
from megatron_deft.loss import linear_head
from tests.oracle import loss_and_grad

ROOT = Path(__file__).parents[2]
NAMES = list(contenders("deft"))
FAST = "logits-main-grad,fused-main-grad,logits,fused,products"


def bench(*arguments: str) -> int:
    return main(["bench", "head", "--device", "cpu", "--shape", "12x8x97", *arguments])


def quick(tmp_path: Path, *arguments: str) -> dict:
    """A tiny run; returns what it wrote."""
    path = tmp_path / "result.json"
    assert bench("--repetitions", "2", "--json", str(path), *arguments) == 0
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, str]:
    """Every contender, in a process of its own: result, stdout."""
    path = tmp_path_factory.mktemp("bench") / "all.json"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_deft", "bench", "head", "--device", "cpu",
         "--shape", "24x16x507", "--dtype", "bf16", "--dtype", "fp32",
         "--repetitions", "2", "--threads", "1", "--json", path],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_every_contender_has_a_row(whole):
    result, out = whole
    assert result["benchmark"] == "head"
    assert result["complete"]
    assert result["arguments"]["plans"] == ["24 x 16 x 507 bf16", "24 x 16 x 507 fp32"]
    found = [(row["dtype"], row["ignored"], row["name"]) for row in result["rows"]]
    assert found == [(d, f, name) for d in ("bf16", "fp32") for f in (0.0, 0.5) for name in NAMES]
    for row in result["rows"]:
        if row["name"].startswith("liger"):
            assert row["status"] == "needs cuda"
            assert any(
                line.split(None, 1) == [row["name"], "needs cuda"] for line in out.splitlines()
            )
        else:
            assert row["status"] == "measured"
            assert row["median_ms"] > 0
            assert row["repetitions"] == 2
        assert row["logits_bytes"] == 24 * 507 * {"bf16": 2, "fp32": 4}[row["dtype"]]
    assert "main_grad" in result["method"]
    assert "24 x 16 x 507 fp32, 50% of the tokens ignored" in out


def test_ratios_are_those_of_the_figures_beside_them(whole):
    result, _ = whole
    rows = {(r["dtype"], r["ignored"], r["name"]): r for r in result["rows"]}
    for (dtype, ignored, _), row in rows.items():
        if row["median_ms"] is None:
            continue
        for baseline, ratio in row["time_over"].items():
            wanted = row["median_ms"] / rows[dtype, ignored, baseline]["median_ms"]
            assert math.isclose(ratio, wanted)
        if row["peak_bytes"] is not None:
            wanted = row["peak_bytes"] / row["logits_bytes"]
            assert math.isclose(row["peak_over"]["logits_bytes"], wanted)
        fused = row["name"].startswith("fused")
        assert (row["chunk_bytes"] is not None) == fused
        if fused:
            assert row["chunk_bytes"] <= max(linear_head.CPU_CHUNK_BYTES.values())


def test_the_markdown_table_holds_the_rows(whole):
    result, _ = whole
    tables = markdown(result).split("\n\n")
    assert len(tables) == 2
    for table, dtype in zip(tables, ("bf16", "fp32"), strict=True):
        header, _, *lines = table.splitlines()
        assert header.startswith(f"| 24 x 16 x 507 {dtype} | ms, 0% ignored | ms, 50% ignored |")
        names = [line.split("`")[1] for line in lines]
        assert names == [name for name in NAMES if not name.startswith("liger")]
        assert len({line.count("|") for line in [header, *lines]}) == 1


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("objective", ["nll", "eaft", "cayley"])
def test_other_objectives_and_types(objective, dtype, tmp_path):
    only = f"{FAST},fused-forward"
    result = quick(tmp_path, "--objective", objective, "--dtype", dtype, "--only", only)
    status = {row["name"]: row["status"] for row in result["rows"]}
    if objective == "cayley" or dtype == "fp16":
        assert status.pop("fused-forward").startswith("refused: form=forward: ")
    assert set(status.values()) == {"measured"}
    assert {line["met"] for line in result["budgets"]} == {None}


def test_a_wrong_contender_is_refused(tmp_path, monkeypatch, caplog):
    def wrong(hidden, weight, labels):
        return F.cross_entropy(F.linear(hidden, weight).float() * 1.02, labels, reduction="none")

    monkeypatch.setattr(head_contenders, "_eager_nll", wrong)
    path = tmp_path / "result.json"
    only = "--only", "eager-nll,logits", "--ignored", "0", "--dtype", "fp32"
    assert bench("--repetitions", "1", *only, "--json", str(path)) == 1
    result = json.loads(path.read_text())
    assert {row["name"] for row in result["rows"]} == {"logits"}
    assert "eager-nll: loss: relative error" in result["wrong"][0]
    assert "WRONG, so not measured: 12 x 8 x 97 fp32, 0 ignored: eager-nll" in caplog.text


@pytest.mark.parametrize("name", ["grad_hidden", "grad_weight"])
@pytest.mark.parametrize("row", [0, 3, -1])
def test_a_wrong_gradient_in_one_row_is_seen(name, row):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 5, generator=generator)
    weight = torch.randn(33, 5, generator=generator)
    every = torch.randint(33, (6,), generator=generator)
    labels = every.clone()
    labels[1] = -100
    logits = hidden.double() @ weight.double().t()
    loss, grad, _, _ = loss_and_grad("DEFT", logits, labels, 33, torch.ones(6))
    outcome = HeadOutcome(loss, grad @ weight.double(), grad.t() @ hidden.double())
    check = partial(
        HeadReference(hidden, weight, every).verify,
        objective="deft", labels=labels, rounding=Rounding(),
    )  # fmt: skip
    check(HeadOutcome(*(value.float() for value in outcome)))
    check(HeadOutcome(outcome.loss.float().sum(), *outcome[1:]))
    getattr(outcome, name)[row, 2] += 0.01
    with pytest.raises(WrongResultError, match=f"gradient of {name[5:]}: relative error"):
        check(outcome)
    getattr(outcome, name)[row, 2] = math.nan
    with pytest.raises(WrongResultError, match=f"gradient of {name[5:]}: relative error nan"):
        check(outcome)


def test_the_logits_path_ends_in_main_grad():
    _, weight, _, labels = make_inputs(HeadPlan(6, 4, 19, "bf16"), "cpu")
    hidden = torch.randn(6, 4).bfloat16()
    for name in ("logits-main-grad", "fused-main-grad", "megatron"):
        weight.main_grad.zero_()
        run = contenders("nll")[name].prepare(weight, labels[0.0])
        once = run(hidden).grad_weight.clone()
        assert once.dtype == torch.float32
        assert weight.grad is None
        torch.testing.assert_close(run(hidden).grad_weight, 2 * once)
    assert contenders("nll")["fused"].prepare(weight, labels[0.0])(hidden).grad_weight.dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "fused,liger2"], "unknown liger2; legal are logits-main-grad"),
        (["--shape", "512x7"], "--shape 512x7: expected TOKENSxHIDDENxVOCABULARY, such as 512x512"),
        (["--shape", "0x4x4"], "--shape 0x4x4"),
        (["--ignored", "1"], "--ignored 1: expected a fraction"),
        (["--objective", "sgd"], "unknown objective 'sgd'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert bench(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megatron-deft: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_the_default_runs():
    assert head_plans("cpu", None, None) == list(HEAD_PLANS["cpu"])
    assert [plan.ignored for plan in head_plans("cuda", None, None)] == [(0.0, 0.5), (0.5,)]
    assert head_plans("cuda", ["4x5x6"], None, [0.25]) == [HeadPlan(4, 5, 6, "bf16", (0.25,))]
    assert head_plans("cpu", None, ["fp16"]) == [HeadPlan(512, 512, 151936, "fp16")]


def row(ms: float, over: float, peak: float, chunks: float | None) -> dict:
    return {
        "status": "measured", "median_ms": ms, "time_over": {"logits-main-grad": over},
        "peak_bytes": 100, "peak_bytes_at_twice": 135, "hidden_gradient_bytes": 5,
        "chunk_bytes": 100,
        "peak_over": {"logits-main-grad": peak, "chunk_bytes": chunks},
    }  # fmt: skip


def test_budgets_are_judged_from_the_rows():
    rows = {
        ("fused-main-grad", 0.0): row(9.0, 0.9, 0.1, 1.1),
        ("fused-main-grad", 0.5): row(7.0, 0.7, 0.2, 1.0),
    }
    lines = judge({HEAD_PLANS["cpu"][0]: rows}, "cpu", 2, "deft", BUDGETS)
    found = [(line["measured"], line["met"]) for line in lines]
    assert found[:5] == [(0.9, True), (0.7, False), (0.2, False), (1.1, True), (1.3, False)]
    assert found[5:] == [(None, None)] * 5  # fp32
    rows["fused-main-grad", 0.5] |= {"peak_bytes": None, "peak_over": {"logits-main-grad": None}}
    assert BUDGETS[2].measure(rows) is None  # one part of it is not known


def test_cuda_budgets():
    timed, longer = HEAD_PLANS["cuda"]
    rows = {
        (name, ignored): row(16.0 - 8 * ignored, 0.5, 0.1, 1.3 if ignored else 1.1)
        for name in ("fused", "fused-main-grad")
        for ignored in (0.0, 0.5)
    }
    lines = judge({timed: rows, longer: rows}, "cuda", 16, "deft", BUDGETS)
    assert [(line["measured"], line["met"]) for line in lines] == [
        (16.0, True), (0.75, False), (1.3, False), (1.3, False), (1.3, False),
    ]  # fmt: skip


def test_strict_turns_a_missed_budget_into_exit_code_1(monkeypatch):
    arguments = ("--repetitions", "1", "--only", "products", "--strict")
    for met, code in ((True, 0), (False, 1), (None, 1)):
        line = {"name": "b", "where": "w", "required": "<= 1", "measured": 1.0, "met": met}
        monkeypatch.setattr(shared, "judge", lambda *_, line=line: [line])
        assert bench(*arguments) == code
