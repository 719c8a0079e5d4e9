"""`megatron-deft bench convert` at a tiny shape: what it writes, and how much memory it takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_deft.benchmarks import convert, synthetic
from megatron_deft.benchmarks.convert import budget_bytes, judge
from megatron_deft.cli import main

MIB = 2**20
SLACK = 64 * MIB  # of the allocator, the threads and one block, beside the tensors themselves


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("bench")
    path = work / "result.json"
    where = ["--dir", str(work), "--json", str(path), "--warm", "--strict"]
    assert main(["bench", "convert", "--shape", "tiny", *where]) == 0
    assert [entry.name for entry in work.iterdir()] == ["result.json"], "it cleans up"
    return json.loads(path.read_text())


def test_every_row_and_where_it_was_made(result: dict[str, Any]) -> None:
    names = [row["name"] for row in result["rows"]]
    assert names == ["baseline", "cp", "import", "export", "cp again"]
    best = min(row["seconds"] for row in result["rows"] if row["name"].startswith("cp"))
    for row in result["rows"][1:]:
        assert row["share_of_copy"] == pytest.approx(best / row["seconds"])
        speed = result["model"]["bytes"] / row["seconds"] / 1e9
        assert row["gigabytes_per_second"] == pytest.approx(speed)
    assert result["different"] == []
    assert result["caches"] == "left alone"
    assert {"machine", "versions", "commit", "date", "method"} <= set(result)
    assert result["versions"]["torch"] == torch.__version__


def test_peak_memory_is_two_tensors_whatever_the_size_of_the_model(result: dict[str, Any]) -> None:
    """The stated budget, and the same without its 1 GiB: interpreter and torch are measured."""
    rows = {row["name"]: row for row in result["rows"]}
    largest = result["model"]["largest_tensor_bytes"]
    allowed = rows["baseline"]["peak_bytes"] + 2 * largest + SLACK
    assert 2 * largest + SLACK < result["model"]["bytes"] / 2, "a whole model would not fit"
    for name in ("import", "export"):
        assert rows["baseline"]["peak_bytes"] < rows[name]["peak_bytes"] <= allowed
        assert rows[name]["peak_bytes"] <= budget_bytes(largest)
    assert [line["name"] for line in result["budgets"]] == [
        "import: peak memory, GiB",
        "export: peak memory, GiB",
    ]
    assert all(line["met"] for line in result["budgets"])


def test_budgets_are_judged_on_both_sides_of_their_borders() -> None:
    model = {"shape": "8b", "largest_tensor_bytes": 2**30}
    row = {"share_of_copy": 0.5, "peak_bytes": 3 * 2**30}
    good, bad = row | {"name": "import"}, {
        "name": "export", "share_of_copy": 0.49, "peak_bytes": 3 * 2**30 + 1
    }  # fmt: skip
    assert [line["met"] for line in judge([good, bad], model)] == [True, True, False, False]


def test_shapes_are_those_of_the_models() -> None:
    assert synthetic.model_bytes("8b") == 8_030_261_248 * 2
    assert synthetic.largest_bytes("8b") == 128256 * 4096 * 2
    assert synthetic.model_bytes("1b") == 1_235_814_400 * 2


def test_a_synthetic_model_is_one_to_transformers(tmp_path: Path) -> None:
    """And `different` names what is not as it was made."""
    synthetic.make(tmp_path / "hf", "tiny")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16
    name = "model.layers.3.mlp.up_proj.weight"
    weight = model.state_dict()[name]
    wanted = synthetic.tensor(name, tuple(weight.shape), synthetic.random_block())
    assert torch.equal(weight, wanted)
    assert 0.019 < weight.float().std() < 0.021
    assert synthetic.different(tmp_path / "hf", "tiny") == []
    file = tmp_path / "hf" / "model.safetensors"
    with open(file, "r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"\xff")
    assert len(synthetic.different(tmp_path / "hf", "tiny")) == 1
    file.unlink()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dir", "absent"], "--dir absent: no such folder"),
        (["--json", "."], "--json .: is a folder"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["bench", "convert", "--shape", "tiny", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_disk_without_room_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "OVERHEAD", 2**60)
    assert main(["bench", "convert", "--shape", "tiny", "--dir", str(tmp_path)]) == 2
    assert "GB left: free some, or name a folder on another disk" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
