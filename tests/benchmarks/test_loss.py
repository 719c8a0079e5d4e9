"""`megatron-deft bench loss` at tiny shapes: what it writes and refuses; never how fast it is."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_deft.benchmarks import contenders as contenders_module
from megatron_deft.benchmarks import peers, shared
from megatron_deft.benchmarks.arguments import EVERYTHING, Plan, plans
from megatron_deft.benchmarks.budgets import BUDGETS, judge
from megatron_deft.benchmarks.check import Reference, WrongResultError, verify
from megatron_deft.benchmarks.contenders import Outcome, contenders
from megatron_deft.benchmarks.timing import CpuClock, interleave, peak, summary
from megatron_deft.cli import main
from tests.oracle import loss_and_grad

ROOT = Path(__file__).parents[2]
FAST = "copy,row_stats,ours-inplace-single,ours-nll-out-two,eager-nll,eager-deft"


def bench(*arguments: str) -> int:
    return main(["bench", "loss", "--device", "cpu", *arguments])


def quick(tmp_path: Path, *arguments: str) -> dict:
    """A tiny run of a few contenders; returns what it wrote."""
    path = tmp_path / "result.json"
    code = bench("--shape", "16x301", "--repetitions", "3", "--json", str(path), *arguments)
    assert code == 0
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, str, str]:
    """Every contender, in a process of its own: result, stdout, stderr."""
    path = tmp_path_factory.mktemp("bench") / "all.json"
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "bench_loss.py", "--device", "cpu", "--shape", "24x507",
         "--repetitions", "2", "--threads", "1", "--json", path],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout, done.stderr


def test_every_contender_has_a_row_with_every_field(whole):
    result, _, _ = whole
    assert result["complete"]
    names = list(contenders("deft"))
    assert [(row["name"], row["ignored"]) for row in result["rows"]] == [
        (name, ignored) for name in names for ignored in (0.0, 0.5)
    ]
    fields = set(result["rows"][0])
    assert fields == {
        "name", "what", "kind", "objective", "package", "tokens", "vocabulary", "dtype", "ignored",
        "status", "median_ms", "iqr_ms", "repetitions", "bytes_of_a_logit", "passes",
        "extra_bytes_per_logit", "gigabytes_per_second", "share_of_copy", "speedup_over",
    }  # fmt: skip
    measured = {row["name"] for row in result["rows"] if row["status"] == "measured"}
    assert {name for name in names if not contenders("deft")[name].package} <= measured
    assert {"megatron", "megatron-fused"} <= measured
    for row in result["rows"]:
        assert set(row) == fields
        if row["status"] == "measured":
            assert row["median_ms"] > 0
            assert row["iqr_ms"] >= 0
            assert row["repetitions"] == 2


def test_the_file_says_where_it_was_made(whole):
    result, _, _ = whole
    assert {"cpu", "cores", "threads", "instruction_set", "system", "huge_pages"} == set(
        result["machine"]
    )
    assert result["machine"]["threads"] == 1
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["liger-kernel"] == peers.version("liger-kernel")
    assert result["operators"] in ("native", "reference")
    assert result["arguments"]["plans"] == ["24 x 507 bf16"]
    assert {"commit", "date", "method", "memory"} <= set(result)


def test_the_table_names_what_is_missing_and_where_the_file_is(whole):
    result, out, err = whole
    assert "24 x 507 bf16, 0% of the tokens ignored" in out
    assert "24 x 507 bf16, 50% of the tokens ignored" in out
    for row in result["rows"]:
        assert row["status"] == "measured" or any(
            line.split(None, 1) == [row["name"], row["status"]] for line in out.splitlines()
        )
    assert out.splitlines()[-1].endswith("all.json: everything measured")
    assert "checking every contender against float64" in err


def test_ratios_are_those_of_the_medians_beside_them(tmp_path):
    result = quick(tmp_path, "--only", FAST)
    medians = {(row["name"], row["ignored"]): row["median_ms"] for row in result["rows"]}
    assert len(medians) == 12
    for row in result["rows"]:
        for baseline, ratio in row["speedup_over"].items():
            if row["kind"] == "step":
                wanted = medians[baseline, row["ignored"]] / row["median_ms"]
                assert math.isclose(ratio, wanted)
            else:
                assert ratio is None
    by_name = {row["name"]: row for row in result["rows"] if row["ignored"] == 0}
    stats, copy = by_name["row_stats"], by_name["copy"]
    assert math.isclose(stats["gigabytes_per_second"], 16 * 301 * 2 / stats["median_ms"] / 1e6)
    wanted = stats["gigabytes_per_second"] / copy["gigabytes_per_second"]
    assert math.isclose(stats["share_of_copy"], wanted)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("objective", ["dft", "eaft", "nll"])
def test_other_objectives_and_types(objective, dtype, tmp_path):
    only = "row_stats,gate_grad,ours-inplace-single,ours-out-two,megatron"
    result = quick(tmp_path, "--objective", objective, "--dtype", dtype, "--only", only)
    status = {row["name"]: row["status"] for row in result["rows"]}
    if dtype == "fp16":
        assert status.pop("ours-inplace-single").startswith("refused: grad_in_forward: ")
    assert set(status.values()) == {"measured"}
    assert {line["met"] for line in result["budgets"]} == {None}


def test_a_wrong_contender_is_refused(tmp_path, monkeypatch, capsys, caplog):
    def wrong(logits, labels):
        return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none") * 1.02

    monkeypatch.setattr(contenders_module, "_eager_nll", wrong)
    path = tmp_path / "result.json"
    only = "eager-nll,eager-deft"
    assert bench("--shape", "8x99", "--repetitions", "1", "--only", only, "--json", str(path)) == 1
    result = json.loads(path.read_text())
    assert {row["name"] for row in result["rows"]} == {"eager-deft"}
    assert "eager-nll: loss: relative error" in result["wrong"][0]
    assert "WRONG, so not measured: 8 x 99 bf16, 0 ignored: eager-nll" in caplog.text


@pytest.mark.parametrize("row", [0, 1, 3])
def test_a_wrong_gradient_in_one_row_is_seen(row):
    logits, labels = torch.randn(4, 99), torch.randint(99, (4,))
    reference = Reference(logits, labels)
    labels[1] = -100
    expected = reference.expected("deft", labels)
    loss, grad, _, _ = loss_and_grad("DEFT", logits, labels, 99, torch.ones(4))
    torch.testing.assert_close(expected.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(expected.grad, grad, rtol=1e-12, atol=1e-12)
    verify(Outcome(loss.float(), grad.float()), expected, None)
    off = grad.float()
    off[row, 7] += 1e-3
    with pytest.raises(WrongResultError, match="gradient"):
        verify(Outcome(loss.float(), off), expected, None)
    off[row, 7] = math.nan
    with pytest.raises(WrongResultError, match="gradient"):
        verify(Outcome(None, off), expected, None)


def test_a_package_that_fails_is_a_row_that_says_so(tmp_path, monkeypatch, capsys):
    def load():
        raise ImportError("no module\nnamed x")

    broken = peers.Peer("broken", "a peer that does not import", "torch", load, ("cpu",))
    absent = peers.Peer("absent", "a peer that is not there", "no-such-package", load, ("cpu",))
    monkeypatch.setattr(peers, "PEERS", (broken, absent))
    result = quick(tmp_path, "--only", "broken,absent,read", "--ignored", "0")
    status = {row["name"]: row["status"] for row in result["rows"]}
    assert status == {
        "read": "measured",
        "broken": "fails: ImportError: no module named x",
        "absent": "not installed",
    }
    assert "not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "read,eager-nnl"], "--only read,eager-nnl: unknown eager-nnl; legal are read"),
        (["--only", ","], "legal are read"),
        (["--shape", "512"], "--shape 512: expected TOKENSxVOCABULARY"),
        (["--shape", "0x4"], "--shape 0x4"),
        (["--ignored", "1"], "--ignored 1: expected a fraction"),
        (["--threads", "0"], "--threads 0: expected at least 1"),
        (["--objective", "sgd"], "unknown objective 'sgd'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert bench("--shape", "8x99", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megatron-deft: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_one_line(capsys):
    assert main(["bench", "loss", "--device", "cuda"]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_the_threads_are_put_back(tmp_path):
    before = torch.get_num_threads()
    quick(tmp_path, "--only", "read", "--threads", "1")
    assert torch.get_num_threads() == before


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "loss", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "example:\n  megatron-deft bench loss --shape 512x32000" in text


# What is measured, and how


def test_the_default_runs():
    assert plans("cpu", None, None) == [Plan(512, 151936, "bf16", EVERYTHING)]
    default = plans("cuda", None, None)
    assert default[0] == Plan(8192, 128256, "bf16", EVERYTHING)
    assert Plan(4096, 18992, "fp32", ("bandwidth", "kernel")) in default
    assert len(default) == 3 + 3 + 2 * 6
    assert plans("cuda", ["4x5"], ["fp16"]) == [Plan(4, 5, "fp16")]


def test_contenders_take_turns_on_fresh_logits():
    original, work, turns = torch.randn(3, 5), torch.zeros(3, 5), []

    def contender(name):
        def run(logits):
            turns.append(name)
            assert torch.equal(logits, original)
            logits.zero_()

        return run

    times = interleave([contender(n) for n in "abc"], original, work, CpuClock(), 4)
    orders = ["".join(turns[i : i + 3]) for i in range(0, 12, 3)]
    assert [sorted(order) for order in orders] == [["a", "b", "c"]] * 4
    assert len(set(orders)) > 1
    assert [t.repetitions for t in times] == [4, 4, 4]


def test_summary():
    assert summary([3e-3, 1e-3, 2e-3, 10e-3, 4e-3]) == pytest.approx((3.0, 2.0, 5))
    assert summary([3e-3]) == pytest.approx((3.0, 0.0, 1))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_memory_that_is_gone_again_counts():
    original = torch.randn(4, 5)
    size = 64 << 20

    def run(logits):
        torch.ones(size, dtype=torch.uint8)  # freed before run returns

    extra = peak(run, original, original.clone(), CpuClock())
    assert extra is not None
    assert size * 0.95 < extra < size * 1.2
    nothing = peak(lambda logits: None, original, original.clone(), CpuClock())
    assert nothing is not None
    assert nothing < size * 0.05


def test_budgets_are_judged_from_the_rows():
    plan = Plan(512, 151936, "bf16")
    row = {"bytes_of_a_logit": 2, "extra_bytes_per_logit": 0.03, "share_of_copy": None}
    medians = {"eager-deft": 150.0, "eager-nll": 50.0, "ours-inplace-single": 10.0,
               "ours-out-single": 20.0, "ours-out-two": 16.0}  # fmt: skip
    rows = {(name, 0.0): {**row, "median_ms": ms} for name, ms in medians.items()}
    lines = judge({plan: rows}, "cpu", 2, "deft")
    assert [(line["measured"], line["met"]) for line in lines] == [
        (15.0, True), (5.0, False), (9.375, True), (3.125, False), (0.015, False),
    ]  # fmt: skip
    for other in (judge({plan: rows}, "cpu", 3, "deft"), judge({plan: rows}, "cpu", 2, "dft")):
        assert [line["met"] for line in other] == [None] * 5


def test_cuda_budgets_have_a_line_for_each_shape():
    names = ("row_stats", "gate_grad", "row_stats_grad", "ours-inplace-single", "liger")
    row = {"bytes_of_a_logit": 2, "share_of_copy": 0.95, "median_ms": 2.0}
    whole = {(name, 0.0): row for name in names} | {("row_stats", 0.5): row}
    shard = {("row_stats", 0.0): row}
    measured = {Plan(8192, 128256, "bf16"): whole, Plan(8192, 16032, "fp32"): shard}
    lines = judge(measured, "cuda", 16, "deft")
    assert len(lines) == 2 + 1 + 2 + 1 + 1 + 5
    found = {(line["name"], line["where"]): line for line in lines}
    share = found["row_stats: share of copy bandwidth", "8192 x 16032 fp32"]
    assert (share["required"], share["measured"], share["met"]) == (">= 0.9", 0.95, True)
    half = found["row_stats: half ignored over none ignored", "8192 x 128256 bf16"]
    assert (half["measured"], half["met"]) == (1.0, False)
    liger = found["deft in place, one read, over liger", "8192 x 128256 bf16"]
    assert (liger["measured"], liger["met"]) == (1.0, False)
    megatron = found["deft in place, one read, over megatron", "8192 x 128256 bf16"]
    assert megatron["met"] is None


def test_strict_turns_a_missed_budget_into_exit_code_1(tmp_path, monkeypatch):
    assert BUDGETS
    arguments = ("--shape", "8x99", "--repetitions", "1", "--only", "read", "--strict")
    for met, code in ((True, 0), (False, 1), (None, 1)):
        line = {"name": "b", "where": "w", "required": ">= 1", "measured": 1.0, "met": met}
        monkeypatch.setattr(shared, "judge", lambda *_, line=line: [line])
        assert bench(*arguments) == code
