"""Every objective in every layout, from logits and without: the numbers of one process.

`make matrix` trains all combinations and writes MATRIX; without it one of each layout is trained.
"""

import json
import os
from pathlib import Path

import pytest

from megatron_deft.benchmarks.machine import machine
from megatron_deft.config import RunConfig
from megatron_deft.data.prepare.settings import RowSettings
from megatron_deft.data.prepare.tokenise import prepare_set
from megatron_deft.revision import commit
from tests.distributed import run_ranks
from tests.training.layouts import make_models
from tests.training.matrix import (
    CELLS,
    LAYOUTS,
    OBJECTIVES,
    PATHS,
    RANKS,
    STEPS,
    Cell,
    markdown,
    some,
)
from tests.training.ranks import config, metrics, train_groups

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tools" / "bench_results" / "matrix.json"
MATRIX = os.environ.get("MATRIX")
TRAINED = CELLS if MATRIX else some()
# relative, of the first step and of the second, whose weights the first has changed
LIMITS = {"loss": (1e-5, 1e-3), "ce": (1e-5, 1e-3), "grad_norm": (2e-5, 2e-3)}


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs LAYOUT/OBJECTIVE/PATH, and of FORM/OBJECTIVE in one process."""
    root = tmp_path_factory.mktemp("matrix")
    make_models(base, root, "dense", "experts")
    prepare_set(root / "set", [str(base / "train.jsonl")], base / "hf", RowSettings(max_length=64))
    wholes: dict[str, dict[Path, RunConfig]] = {}
    splits: dict[str, list[RunConfig]] = {}
    for cell in TRAINED:
        name, objective, path = cell
        layout, whole = LAYOUTS[name], whole_folder(root, cell)
        splits.setdefault(name, []).append(
            a_run(root, cell, root / name / objective / path, **layout.keys, **PATHS[path])
        )
        form = wholes.setdefault(whole.parent.name, {})
        form[whole] = a_run(root, cell, whole, **layout.whole)
    run_ranks(1, train_groups, [list(group.values()) for group in wholes.values()])
    refused = run_ranks(RANKS, train_groups, list(splits.values()))[0]
    for run_dir, reason in refused.items():
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        (Path(run_dir) / "refused").write_text(reason)
    return root


def whole_folder(root: Path, cell: Cell) -> Path:
    layout = LAYOUTS[cell[0]]
    return root / " ".join(["whole", layout.model, *layout.whole]) / cell[1]


def a_run(root: Path, cell: Cell, run_dir: Path, **keys: object) -> RunConfig:
    common = {
        "objective": cell[1],
        "data.train_files": "[]",
        "data.train_sets": f"[{root / 'set'}]",
        "optim.warmup_ratio": 0,
        "train.global_batch": 16,
        "train.steps": STEPS,
    }
    return config(root / LAYOUTS[cell[0]].model, run_dir, **common, **keys)


def outcome(root: Path, cell: Cell) -> str:
    """ "equal", the error that refuses it, or in what it differs from the run in one process."""
    run_dir = root.joinpath(*cell)
    if (run_dir / "refused").exists():
        return (run_dir / "refused").read_text()
    want, got = metrics(whole_folder(root, cell)), metrics(run_dir)
    assert len(want) == len(got) == STEPS
    assert want[0]["loss"] != pytest.approx(want[1]["loss"], rel=1e-2), "nothing learned"
    different = [
        f"{name} of step {step + 1} is {got[step][name]} and not {want[step][name]}"
        for name, limits in LIMITS.items()
        for step, limit in enumerate(limits)
        if got[step][name] != pytest.approx(want[step][name], rel=limit)
    ]
    return "; ".join(different) or "equal"


def test_every_objective_trains_in_every_layout_as_in_one_process(folder: Path) -> None:
    outcomes = {cell: outcome(folder, cell) for cell in TRAINED}
    if MATRIX:
        cells = {n: {o: {p: outcomes[n, o, p] for p in PATHS} for o in OBJECTIVES} for n in LAYOUTS}
        about = {"machine": machine("cpu"), "commit": commit(), "steps": STEPS}
        Path(MATRIX).write_text(json.dumps(about | {"cells": cells}, indent=1) + "\n")
    recorded = json.loads(Path(MATRIX or RECORDED).read_text())["cells"]
    for (layout, objective, path), how in outcomes.items():
        assert how == recorded[layout][objective][path], (layout, objective, path)
        assert " of step " not in how, (layout, objective, path)


def test_the_readme_has_the_table_of_the_committed_run() -> None:
    recorded = json.loads(RECORDED.read_text())
    cells = [(n, o, p) for n, row in recorded["cells"].items() for o in row for p in row[o]]
    assert cells == list(CELLS)
    assert f"\n{markdown(recorded)}\n" in (ROOT / "README.md").read_text()


def test_a_refusal_stands_in_the_table_with_its_reason() -> None:
    cells = {"a": {o: dict.fromkeys(PATHS, "equal") for o in OBJECTIVES}}
    cells["a"]["dft"]["logits"] = cells["a"]["nll"]["logits"] = "no such thing"
    cells["a"]["deft"] = dict.fromkeys(PATHS, "not here")
    recorded = {"cells": cells, "machine": {"cores": 1, "cpu": "x"}, "commit": "y"}
    lines = markdown(recorded).splitlines()
    assert lines[2] == "| a | ✓, [1] | ✓, [1] | ✓ | ✓ | ✓ | [2], [3] |"
    assert lines[4:6] == ["[1] logits: no such thing", "[2] logits: not here"]
