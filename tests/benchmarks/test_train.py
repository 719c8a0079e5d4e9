"""`megatron-deft bench train` at a tiny shape: what it writes and refuses; never how fast it is."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_deft.benchmarks.arguments import TRAIN_PLANS, train_plan
from megatron_deft.benchmarks.train import judge, markdown, rows_of, wrong_losses
from megatron_deft.benchmarks.train_contenders import CONTENDERS
from megatron_deft.cli import main
from megatron_deft.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Every contender: result, stdout. The exit code says that they had the same losses."""
    path = tmp_path_factory.mktemp("bench") / "all.json"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_deft", "bench", "train", "--shape", "2x64x1000x32",
         "--repetitions", "2", "--threads", "1", "--json", path],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_every_contender_steps_on_the_same_batches(whole: tuple[dict[str, Any], str]) -> None:
    result, out = whole
    assert result["complete"]
    assert result["wrong"] == []
    assert [row["name"] for row in result["rows"]] == list(CONTENDERS)
    for row in result["rows"]:
        assert len(row["seconds"]) == row["repetitions"] == 2
        assert row["tokens_per_second"] == pytest.approx(8 * 32 / row["median_ms"] * 1e3)
        assert row["peak_bytes"] > 10**8
        assert row["name"] in out
    medians = {row["name"]: row["median_ms"] for row in result["rows"]}
    over = result["rows"][0]["time_over"]
    assert over == {name: medians["deft"] / medians[name] for name in ("core", "hf-deft")}
    paths = {row["name"]: row["path"] for row in result["rows"]}
    assert paths["deft-logits"] == "logits"
    assert "megatron-core's own" in paths["core"]
    assert result["budgets"] == []  # set for the device's own shape
    assert result["machine"]["threads"] == 1
    assert "2 layers x 64, vocabulary 1000, 8 x 32 tokens, fp32" in out
    assert markdown(result).count("\n") == 1 + len(CONTENDERS)


def test_another_loss_is_named() -> None:
    found = {
        "deft": {"loss": 2.0, "ce": 3.0},
        "core": {"ce": 3.1},
        "hf-deft": {"loss": 2.0001},
        "deft-logits": {"loss": float("nan"), "ce": 3.0},
    }
    wrong = wrong_losses(found, "fp32")
    assert [line.partition(":")[0] for line in wrong] == ["core", "deft-logits"]
    assert wrong_losses(found, "bf16")[0].startswith("core: ce 3.1, deft has 3")


def test_the_budget_is_set_for_the_plan_of_the_device() -> None:
    said = {name: {"tokens": 8, "peak_bytes": 1, "path": ""} for name in ("deft", "core")}
    rows = rows_of({"deft": [0.11, 0.09, 0.1], "core": [0.08, 0.08, 0.08]}, said)
    plan = TRAIN_PLANS["cpu"]
    (line,) = judge(rows, plan, 2)
    assert line["measured"] == pytest.approx(1.25)
    assert line["met"] is False
    assert judge(rows, plan, 1) == judge(rows, plan._replace(layers=2), 2) == []
    (line,) = judge(rows[:1] and rows_of({"deft": [0.1]}, said), plan, 2)
    assert line["met"] is None


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--shape", "4x256"], "--shape 4x256: expected LAYERSxHIDDENxVOCABULARYxLENGTH"),
        (["--repetitions", "0"], "--repetitions 0: expected at least 1"),
        (["--only", "deft,mine"], "--only mine: legal are deft, deft-logits, core, hf-deft"),
        (["--json", "."], "--json .: is a folder"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "train", *arguments]) == 2
    assert error in capsys.readouterr().err


def test_plans() -> None:
    assert train_plan("cpu", None, None) == TRAIN_PLANS["cpu"]
    assert train_plan("cpu", "2x64x1000x32", "bf16").title.endswith("8 x 32 tokens, bf16")
    with pytest.raises(UserError):
        train_plan("cuda", "2x0x10x10", None)
