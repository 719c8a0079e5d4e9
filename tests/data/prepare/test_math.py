r"""The math data sets: released columns, answers, splits, and every way a source can be bad."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_deft.cli import main
from megatron_deft.data.prepare import splits
from megatron_deft.data.prepare.math import prepare_math
from megatron_deft.data.prepare.released import LIGHTEVAL, MATH, NUMINA, SUFFIX
from megatron_deft.errors import UserError
from tests.data.prepare.conftest import (
    MATH_ROWS,
    NUMINA_ROWS,
    QUIET,
    read,
    write_jsonl,
    write_parquet,
)


def prepare(out: Path, *files: Path, **options: Any) -> dict[str, Any]:
    changes = {k: options.pop(k) for k in list(options) if k in QUIET.__dict__}
    return prepare_math(out, [str(file) for file in files], choice=replace(QUIET, **changes),
                        **options)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "write"), [("n.parquet", write_parquet), ("n.jsonl", write_jsonl)]
)
def test_rows_are_those_of_the_released_trainers(tmp_path: Path, name: str, write: Any) -> None:
    prepare(tmp_path / "out", write(tmp_path / name, NUMINA_ROWS))
    rows = read(tmp_path / "out")
    problem, solution = NUMINA_ROWS[0]["problem"], NUMINA_ROWS[0]["solution"]
    user = {"role": "user", "content": problem + SUFFIX}
    assert rows[0] == {
        "data_source": NUMINA,
        "prompt": [user],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "\\frac{13}{6}"},
        "extra_info": {
            "split": "train",
            "index": 0,
            "question": problem,
            "answer": solution,
            "question_instruction": problem + SUFFIX,
            "source": "synthetic_math",
        },
        "messages": [user, {"role": "assistant", "content": solution}],
    }
    assert [row["extra_info"]["index"] for row in rows] == [0, 1, 2, 3]
    assert [row["reward_model"]["ground_truth"] for row in rows] == [
        "\\frac{13}{6}", "\\text{A}", None, "4",
    ]  # fmt: skip
    assert rows[3]["extra_info"]["question"] == "¿Cuánto es 2+2? ∑"


def test_math_keeps_level_and_type(tmp_path: Path) -> None:
    info = prepare(tmp_path / "out", write_parquet(tmp_path / "m.parquet", MATH_ROWS))
    row = read(tmp_path / "out")[1]
    assert row["data_source"] == LIGHTEVAL
    assert (row["extra_info"]["level"], row["extra_info"]["type"]) == ("Level 5", "Number Theory")
    assert info["no_ground_truth"]["count"] == 0


def test_info_says_what_was_made(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "n.jsonl", NUMINA_ROWS)
    info = prepare(tmp_path / "out", file, prompt_types=["qwen-boxed"])
    assert info == json.loads((tmp_path / "out" / "info.json").read_text())
    assert info["sources"] == [{"file": str(file), "bytes": file.stat().st_size, "rows": 4}]
    assert info["rows"] == {"train": 4, "val": 4}
    assert info["val"] == "the first rows, in train too, as in the releases"
    assert info["no_ground_truth"] == {"count": 1, "first": [f"{file} line 3"]}
    assert info["dropped"] == {}
    assert info["prompt_types"] == ["qwen-boxed"]


def test_rows_without_an_answer_can_be_dropped(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "n.jsonl", NUMINA_ROWS)
    info = prepare(tmp_path / "out", file, boxed_only=True)
    assert info["dropped"] == {"no boxed answer": {"count": 1, "first": [f"{file} line 3"]}}
    # the number in the source stays
    assert [row["extra_info"]["index"] for row in read(tmp_path / "out")] == [0, 1, 3]


def test_the_released_prompts_are_written_out(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "n.jsonl", NUMINA_ROWS)
    prepare(tmp_path / "out", file, prompt_types=list(MATH))
    extra = read(tmp_path / "out")[1]["extra_info"]
    for column, write in MATH.values():
        assert extra[column] == write("Is $1 < 2$?")
    with pytest.raises(UserError, match="--prompt-type qwen: legal are qwen-boxed, llama"):
        prepare(tmp_path / "no", file, prompt_types=["qwen"])


def many(count: int) -> list[dict[str, Any]]:
    return [{"problem": f"{i}?", "solution": f"$\\boxed{{{i}}}$"} for i in range(count)]


def indices(folder: Path, split: str) -> list[int]:
    return [row["extra_info"]["index"] for row in read(folder, split)]


def test_validation_is_the_first_128_rows_and_stays_in_train(tmp_path: Path) -> None:
    prepare(tmp_path / "out", write_parquet(tmp_path / "n.parquet", many(300)))
    assert indices(tmp_path / "out", "val") == list(range(128))
    assert indices(tmp_path / "out", "train") == list(range(300))
    splits_of = {row["extra_info"]["split"] for row in read(tmp_path / "out", "val")}
    assert splits_of == {"val"}
    assert {row["extra_info"]["split"] for row in read(tmp_path / "out")} == {"train"}


def test_validation_can_be_held_out(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "n.parquet", many(20))
    info = prepare(tmp_path / "out", file, val_size=5, hold_out=True)
    assert indices(tmp_path / "out", "val") == [0, 1, 2, 3, 4]
    assert indices(tmp_path / "out", "train") == list(range(5, 20))
    assert info["val"] == "the first rows, held out of train"
    with pytest.raises(UserError, match="no row is left to train on"):
        prepare(tmp_path / "no", file, val_size=20, hold_out=True)


def test_the_first_rows_of_a_source(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{i}.jsonl", many(10)) for i in range(2)]
    prepare(tmp_path / "out", *files, limit=13, val_size=0)
    assert indices(tmp_path / "out", "train") == list(range(13))
    assert [row["extra_info"]["question"] for row in read(tmp_path / "out")[9:11]] == ["9?", "0?"]
    assert not (tmp_path / "out" / "val.parquet").exists()


def test_a_seed_draws_rows(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "n.parquet", many(200))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(tmp_path / name, file, limit=50, val_size=10, seed=seed)
    drawn = indices(tmp_path / "a", "train")
    assert len(drawn) == 50
    assert drawn == sorted(drawn) != list(range(50))
    assert drawn == indices(tmp_path / "b", "train") != indices(tmp_path / "c", "train")
    val = indices(tmp_path / "a", "val")
    assert len(val) == 10
    assert set(val) < set(drawn)
    assert val != drawn[:10]


def test_large_files_are_written_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "_ROWS_AT_ONCE", 4)
    prepare(tmp_path / "out", write_parquet(tmp_path / "n.parquet", many(10)))
    assert pq.ParquetFile(tmp_path / "out" / "train.parquet").num_row_groups == 3
    assert indices(tmp_path / "out", "train") == list(range(10))


def test_a_released_file_is_kept_as_it_is(tmp_path: Path) -> None:
    """As the subset of 67,000 has it; and what this package wrote can be read again."""
    own = {
        "split": "train", "index": 7, "question": "Q?", "answer": "A $\\boxed{1}$",
        "hint": "count", "level": 3,
    }  # fmt: skip
    row = {
        "source": "olympiads",
        "data_source": "theirs",
        "reward_model": {"style": "rule", "ground_truth": "one"},
        "extra_info": own,
    }
    file = write_parquet(tmp_path / "r.parquet", [row])
    info = prepare(tmp_path / "out", file, prompt_types=["deepseek-math"])
    made = read(tmp_path / "out")[0]
    assert made["data_source"] == "theirs"
    assert made["reward_model"]["ground_truth"] == "one"
    extra = made["extra_info"]
    assert (extra["question"], extra["answer"], extra["index"]) == ("Q?", own["answer"], 0)
    assert extra["question_instruction"] == "Q?" + SUFFIX
    assert extra["source"] == "olympiads"
    assert extra["deepseek_prompt"] == MATH["deepseek-math"][1]("Q?")
    assert extra["hint"] == "count"
    assert info["left_out"] == ["level"]  # no text
    prepare(tmp_path / "again", tmp_path / "out", prompt_types=["deepseek-math"])
    again = read(tmp_path / "again")[0]
    assert again == made


def test_a_question_that_has_the_instruction_does_not_get_it_twice(tmp_path: Path) -> None:
    row = {"extra_info": {"question": "Q?" + SUFFIX, "answer": "$\\boxed{1}$"}}
    prepare(tmp_path / "out", write_jsonl(tmp_path / "r.jsonl", [row]), prompt_types=["qwen-boxed"])
    made = read(tmp_path / "out")[0]
    assert made["prompt"][0]["content"] == "Q?" + SUFFIX
    assert made["extra_info"]["question"] == "Q?" + SUFFIX
    assert made["extra_info"]["qwen_prompt"] == MATH["qwen-boxed"][1]("Q?")


BAD_ROWS = {
    "null": ({"problem": None, "solution": "s"}, "line 2: problem: expected text, got null"),
    "blank": ({"problem": "p", "solution": " "}, "line 2: solution: expected text, got none"),
    "number": ({"problem": 3, "solution": "s"}, "line 2: problem: expected text, got int"),
    "no column": ({"problem": "p"}, "line 2: no solution, it has problem"),
    "no object": ([], "line 2: expected a JSON object, got list"),
    "surrogate": ({"problem": "\ud800", "solution": "s"}, "line 2: problem: half of a surrogate"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named_or_counted(tmp_path: Path, name: str) -> None:
    bad, message = BAD_ROWS[name]
    file = write_jsonl(tmp_path / "n.jsonl", [many(1)[0], bad, many(1)[0]])
    with pytest.raises(UserError, match=rf"n\.jsonl {message}"):
        prepare(tmp_path / "out", file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n.jsonl"]
    info = prepare(tmp_path / "out", file, bad_rows="drop")
    assert info["rows"]["train"] == 2
    ((reason, what),) = info["dropped"].items()
    assert reason.startswith("bad row: ")
    assert what == {"count": 1, "first": [f"{file} line 2"]}


def test_lines_that_are_no_rows_are_named_or_counted(tmp_path: Path) -> None:
    good = json.dumps(many(1)[0]).encode()
    (tmp_path / "n.jsonl").write_bytes(b"\n".join([b"{broken", good, b'{"problem": "\xff"}', good]))
    with pytest.raises(UserError, match=r"n\.jsonl line 1: not JSON"):
        prepare(tmp_path / "out", tmp_path / "n.jsonl")
    for seed in (None, 1):
        choice = {"bad_rows": "drop", "seed": seed, "overwrite": True}
        info = prepare(tmp_path / "out", tmp_path / "n.jsonl", **choice)
        assert info["rows"]["train"] == 2
        assert sum(what["count"] for what in info["dropped"].values()) == 2


def test_a_row_may_lack_a_label(tmp_path: Path) -> None:
    rows = [{**many(1)[0], "source": "olympiads"}, {"problem": "p", "solution": "s"}]
    prepare(tmp_path / "out", write_jsonl(tmp_path / "n.jsonl", rows))
    labels = [row["extra_info"]["source"] for row in read(tmp_path / "out")]
    assert labels == ["olympiads", None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "--limit 0: at least 1"),
        ({"val_size": -1}, "--val-size -1"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_impossible_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    file = write_jsonl(tmp_path / "n.jsonl", many(1))
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "out", file, **options)


def test_an_existing_folder_is_kept_unless_overwritten(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "n.jsonl", many(3))
    prepare(tmp_path / "out", file)
    with pytest.raises(UserError, match="exists already"):
        prepare(tmp_path / "out", file, limit=1)
    assert len(read(tmp_path / "out")) == 3
    prepare(tmp_path / "out", file, limit=1, overwrite=True)
    assert len(read(tmp_path / "out")) == 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "n.jsonl", NUMINA_ROWS)
    out = tmp_path / "out"
    arguments = ["prepare", "math", str(out), "--source", str(file), "--prompt-type", "qwen-boxed",
                 "--val-size", "2", "--limit", "3"]  # fmt: skip
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 3 train, 2 val (the first rows, in train too, as in the releases)",
        f"{out}: 1 rows kept without a ground truth: see info.json",
    ]
    assert "qwen_prompt" in read(out)[0]["extra_info"]
    again = ["prepare", "math", str(tmp_path / "b"), "--source", str(file)]
    for option, said in (
        ("--template", "--template goes with --tokenizer"),
        ("--tokenizer", "x is not a folder"),
    ):
        assert main([*again, option, "x"]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_script_is_the_command(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "n.jsonl", NUMINA_ROWS)
    script = Path(__file__).parents[3] / "tools" / "prepare_data.py"
    out = tmp_path / "out"
    command = [sys.executable, script, "math", out, "--source", file, "--val-size", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{out}: ")
    assert len(read(out)) == len(NUMINA_ROWS)
