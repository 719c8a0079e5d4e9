"""The README's code and commands run as they stand; its numbers are those of a committed file."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_deft.benchmarks import train
from megatron_deft.benchmarks.head_report import markdown
from megatron_deft.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def blocks(language: str) -> list[str]:
    return [code for name, code in BLOCKS if name == language]


def test_python_blocks_run() -> None:
    namespace: dict[str, object] = {}
    assert len(blocks("python")) >= 3
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)


def test_the_road_runs_as_written(tmp_path: Path) -> None:
    road = next(code for code in blocks("sh") if "convert import" in code)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", road],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 10/10 " in done.stdout
    assert "resumed from runs/deft/checkpoints/step_00000010" in done.stdout
    assert "step 12/12 " in done.stdout
    assert list((tmp_path / "runs" / "deft" / "tensorboard").glob("events*"))  # on by itself
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["models"]) == {"tiny", "deft"}
    assert (tmp_path / "report.html").is_file()


def test_every_command_parses() -> None:
    parser = build_parser()
    lines = [
        line
        for code in blocks("sh")
        for line in code.replace("\\\n", " ").splitlines()
        if line.startswith("megatron-deft ")
    ]
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        if "|" not in words and "--help" not in words:
            _, rest = parser.parse_known_args(words)
            assert not rest or words[0] == "train", line  # whose rest are overrides of keys


@pytest.mark.parametrize(
    "make_target",
    [
        "quickstart",
        "test",
        "matrix",
        "test-transformers4",
        "lint",
        "bench",
        "bench-head",
        "bench-convert",
        "bench-train",
    ],
)
def test_make_targets_exist(make_target: str) -> None:
    assert re.search(rf"^{make_target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"make {make_target}" in README


def test_quickstart_table_is_the_committed_measurement() -> None:
    recorded = json.loads((ROOT / "examples" / "results" / "quickstart.json").read_text())
    assert recorded["machine"]["processor"]
    for name, model in recorded["models"].items():
        means = [model["scores"][key]["mean"] for key in ("exact", "jaro_winkler")]
        cells = [f"{100 * mean:.1f}" for mean in means]
        assert re.search(rf"^\| {name}\b.*\| {cells[0]} .*\| {cells[1]}", README, re.MULTILINE), (
            name
        )


def test_conversion_figures_are_the_committed_measurement() -> None:
    path = ROOT / "tools" / "bench_results" / "convert-cpu.json"
    recorded = json.loads(path.read_text())
    assert recorded["model"]["shape"] == "8b"
    assert recorded["different"] == []
    assert all(line["met"] for line in recorded["budgets"])
    for row in recorded["rows"][1:]:
        cells = [f"{row['seconds']:.1f}", f"{row['gigabytes_per_second']:.3f}"]
        cells.append(f"{row['share_of_copy']:.0%}")
        cells.append(f"{row['peak_bytes'] / 2**30:.2f}" if row["peak_bytes"] else "")
        line = " | ".join([f"`{row['name']}`", *cells]).rstrip()
        assert f"\n| {line} |" in README, line


def test_data_figures_are_the_committed_measurement() -> None:
    recorded = json.loads((ROOT / "tools" / "bench_results" / "data-cpu.json").read_text())
    sections = ("tokenising", "loader", "opening", "packing")
    assert not any(row["wrong"] for name in sections for row in recorded[name])
    for line in recorded["budgets"]:
        assert line["met"], line
        cells = (line["name"], line["where"], line["required"], f"{line['measured']:.3g}")
        assert f"\n| {' | '.join(cells)} |" in README, cells
    ratios = ", ".join(f"{row['ratio_command']:.2f}" for row in recorded["tokenising"])
    assert f"seconds, {ratios})" in README
    ratios = [
        one["encode_batch"] / (one["command"] - one["start"])
        for row in recorded["tokenising"]
        for one in row["repetitions"]
    ]
    assert f"{min(ratios):.2f} to {max(ratios):.2f}." in README


def test_training_figures_are_the_committed_measurement() -> None:
    path = ROOT / "tools" / "bench_results" / "train-cpu.json"
    recorded = json.loads(path.read_text())
    assert recorded["complete"]
    assert not recorded["wrong"]
    assert all(line["met"] for line in recorded["budgets"])
    assert f"\n{train.markdown(recorded)}\n" in README


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_benchmark_figures_are_the_committed_measurement() -> None:
    recorded = json.loads((ROOT / "tools" / "bench_results" / "cpu.json").read_text())
    assert recorded["complete"]
    rows = {row["name"]: row for row in recorded["rows"] if row["ignored"] == 0}
    half = {row["name"]: row for row in recorded["rows"] if row["ignored"] == 0.5}
    assert recorded["machine"]["instruction_set"] in README
    table = re.findall(r"^\| `([a-z-]+)` \| .* " + r"\| (\S+) " * 6 + r"\|$", README, re.M)
    assert len(table) == 8
    for name, *cells in table:
        row = rows[name]
        speedups = (row["speedup_over"][peer] for peer in ("eager-nll", "eager-deft"))
        figures = (row["median_ms"], row["iqr_ms"], *speedups, half[name]["median_ms"])
        assert cells == [f"{x:.1f}" for x in figures] + [f"{row['extra_bytes_per_logit']:.2f}"]
    for name in ("row_stats", "gate_grad", "read", "copy"):
        text = README.replace("\n", " ")
        assert re.search(rf"`{name}` (took )?{rows[name]['median_ms']:.1f}", text), name


def test_head_figures_are_the_committed_measurement() -> None:
    recorded = json.loads((ROOT / "tools" / "bench_results" / "head-cpu.json").read_text())
    assert recorded["complete"]
    assert not recorded["wrong"]
    assert f"\n{markdown(recorded)}\n" in README
