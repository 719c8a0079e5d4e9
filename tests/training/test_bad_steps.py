"""A loss or gradient that is not finite: the step is skipped on all ranks, told and kept."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_deft.checkpoint_folder import read_manifest
from tests.distributed import run_ranks
from tests.training.faulty import Outcome, Poison, nonfinite, poisoned_steps
from tests.training.ranks import (
    config,
    metrics,
    train_all,
    train_and_hear,
)
from tests.training.test_layouts import MODELS, step_folder
from tests.training.test_trainer import refused, same_but_time

Keys = dict[str, Any]
BF16: Keys = {"model.dtype": "bf16"}
PLAIN: Keys = {"parallel.distributed_optimizer": "false"}
GRID: Keys = {"parallel.tensor": 2, "parallel.pipeline": 2}
FC1, NORM, EXPERT = "linear_fc1.weight", "final_layernorm.weight", "experts"
# Layout, on which rank what goes wrong, and in which step. Of TP2 x PP2, rank 3 is the last stage's
# second tensor rank, whose norms count in no gradient norm; rank 0 has no loss.
CASES: dict[str, tuple[Keys, Poison, int]] = {
    "TP2 PP2": (GRID, Poison(0, FC1, math.inf), 2),
    "TP2 PP2, norm of a second tensor rank": (GRID, Poison(3, NORM, math.nan), 2),
    "TP2 PP2 plain bf16": (GRID | PLAIN | BF16, Poison(1, FC1, math.nan), 2),
    "DP4 bf16": (BF16, Poison(2, FC1, math.nan), 2),
    "DP4 plain, the very first step": (PLAIN, Poison(3, FC1, math.inf), 1),
    "DP4, the very first step": ({}, Poison(1, FC1, math.inf), 1),
    "EP2": ({"parallel.expert": 2}, Poison(1, EXPERT, math.nan), 2),
}


@pytest.fixture(scope="module")
def experts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_deft.convert.hf import import_hf
    from tests.convert.tiny_models import make

    root = tmp_path_factory.mktemp("experts")
    shutil.copytree(base / "hf", root / "hf", ignore=lambda _, names: {"config.json"} & set(names))
    make(root / "hf", MODELS["experts"])
    shutil.copy(base / "train.jsonl", root)
    import_hf(root / "hf", root / "megatron", verify=False)
    return root


@pytest.fixture(scope="module")
def outcomes(
    base: Path, experts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[Outcome]]]:
    """Of every case, what each rank saw; and the folder of the runs."""
    root = tmp_path_factory.mktemp("poisoned")
    runs = {
        name: (config(experts if "EP" in name else base, root / name, **keys), poison, bad)
        for name, (keys, poison, bad) in CASES.items()
    }
    ranks = run_ranks(4, poisoned_steps, runs)
    return root, {name: [rank[name] for rank in ranks] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_every_rank_skips_the_step_that_is_bad_on_one(
    outcomes: tuple[Path, dict[str, list[Outcome]]], name: str
) -> None:
    root, of = outcomes
    bad = CASES[name][2]
    for rank, outcome in enumerate(of[name]):
        # the state of the optimizer appears with its first step, or the save before it
        assert outcome.is_untouched, rank
        assert outcome.is_trained_on, rank
        assert outcome.updates <= {2}, rank
        assert outcome.saved == 1
        assert [line["skipped"] for line in outcome.metrics] == [float(n >= bad) for n in (1, 2, 3)]
        assert not any(nonfinite(line) for line in outcome.metrics[bad:])
    assert read_manifest(step_folder(root / name, bad))["skipped"] == 1


def test_a_second_tensor_ranks_norm_is_in_no_gradient_norm(
    outcomes: tuple[Path, dict[str, list[Outcome]]],
) -> None:
    """Or the case above would show nothing that the others do not."""
    line = outcomes[1]["TP2 PP2, norm of a second tensor rank"][0].metrics[1]
    assert not nonfinite(line)
    assert line["skipped"] == 1


def spoilt(base: Path, folder: Path, rows: set[int]) -> Path:
    """train.jsonl as messages; in `rows` a token weighs so much that the sum is infinite."""
    lines = []
    for number, line in enumerate((base / "train.jsonl").read_text().splitlines()):
        texts = json.loads(line)["extra_info"]
        answer = {"role": "assistant", "content": texts["answer"]}
        answer |= {"weight": 3e38} if number in rows else {}
        question = {"role": "user", "content": texts["question"]}
        lines.append(json.dumps({"messages": [question, answer]}))
    path = folder / "spoilt.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_a_run_with_spoilt_samples_goes_on_and_resumes_exactly(base: Path, tmp_path: Path) -> None:
    """Rows 5 and 44 of 64, in an epoch and a half; a save falls due at a bad step."""
    data = spoilt(base, tmp_path, {5, 44})
    common = {
        "data.train_files": f"[{data}]",
        "train.steps": 12,
        "train.save_every": 1,
        "model.hidden_dropout": 0.1,
    }
    run_dir = tmp_path / "run"
    run_ranks(2, train_all, [config(base, run_dir, **common)])
    lines = metrics(run_dir)
    dumps = sorted((run_dir / "bad_steps").iterdir())
    bad = [int(path.stem.removeprefix("step_")) for path in dumps]
    assert len(bad) >= 2
    assert bad == [line["step"] for line in lines if line["loss"] is None]
    assert [line["skipped"] for line in lines] == [
        sum(step <= line["step"] for step in bad) for line in lines
    ]
    for path in dumps:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == 8
        assert {5, 44} & {row["row"] for row in rows}
        for row in rows:
            (document,) = row["documents"]
            assert len(document["tokens"]) == len(document["labels"])
            trained = [label for label in document["labels"] if label != -100]
            assert trained
            # a label is the token that follows
            assert document["labels"][-2] in (-100, document["tokens"][-1])
            # the cause is there to be seen
            assert (max(document["weights"]) > 1e38) == (row["row"] in {5, 44})
    saved = {int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step_*")}
    assert saved == set(range(1, 13)) - set(bad) | ({12} & set(bad))
    # from before the first bad step, and from between the first and the second
    for start in (bad[0] - 1, bad[0] + 1):
        other = tmp_path / f"from {start}"
        resume = {"train.resume": step_folder(run_dir, start)}
        run_ranks(2, train_all, [config(base, other, **common, **resume)])
        assert same_but_time(metrics(other)) == same_but_time(lines)[start:]


def test_too_many_in_a_row_end_the_run_and_name_the_samples(base: Path, tmp_path: Path) -> None:
    data = spoilt(base, tmp_path, set(range(64)))
    common = {"data.train_files": f"[{data}]", "train.save_every": 1}
    for limit in (0, 2):
        run_dir = tmp_path / str(limit)
        cfg = config(base, run_dir, **common, **{"train.max_skipped_steps": limit})
        for message in run_ranks(2, refused, cfg):
            assert f"train.max_skipped_steps={limit}" in message
            assert str(run_dir / "bad_steps" / f"step_{limit + 1:08d}.jsonl") in message
        assert len(metrics(run_dir)) == limit + 1
        assert not (run_dir / "checkpoints").exists()


def test_a_skipped_step_is_told_with_its_rows(base: Path, tmp_path: Path) -> None:
    data = spoilt(base, tmp_path, {0})
    keys = {"data.train_files": f"[{data}]", "data.shuffle": "false", "train.steps": 2}
    said = run_ranks(1, train_and_hear, config(base, tmp_path / "run", **keys))[0]
    (warning,) = (line for line in said.splitlines() if "is skipped" in line)
    assert "step 1 is skipped, weights and optimizer are as before: loss inf" in warning
    assert "1 in a row, 1 in all; its rows (0, 1, 2, 3, 4, 5, 6, 7) are in" in warning
