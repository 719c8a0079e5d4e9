"""Reading runs: names, torn and repeated lines, missing files, what differs."""

import json
from pathlib import Path

import pytest

from megatron_deft.errors import UserError
from megatron_deft.report.runs import Run, differences, find, read_records, read_runs, short_names
from tests.report.made import record, write_run


def read(*arguments: Path | str) -> list[Run]:
    return read_runs([find(str(argument)) for argument in arguments])


def test_a_run(tmp_path: Path) -> None:
    run = read(write_run(tmp_path / "a"))[0]
    assert (run.name, run.objective, len(run.records), run.notes) == ("a", "deft", 40, ())
    assert run.config["optim.lr"] == 1e-5
    assert run.config["data.train_sets"] == ["data/a", "data/b"]


def test_names_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name) for name in ("x/run", "y/run", "z")]
    assert [run.name for run in read(*paths)] == ["x/run", "y/run", "z"]
    assert short_names([tmp_path / "b", tmp_path / "a" / "b"])[1] == "a/b"
    named = read(f"first={paths[0]}", paths[1])
    assert [run.name for run in named] == ["first", "run"]


def test_a_folder_with_an_equals_sign(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "lr=1")
    assert read(folder)[0].name == "lr=1"
    assert read(f"low={folder}")[0].name == "low"


def test_metrics_by_their_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    assert read(folder / "metrics.jsonl")[0].name == "a"
    (folder / "metrics.jsonl").rename(folder / "other.jsonl")
    assert read(folder / "other.jsonl")[0].name == "other"


def test_runs_of_one_name_and_one_run_twice(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    with pytest.raises(UserError, match="2 runs are called n: give each a name"):
        read(f"n={a}", f"n={b}")
    with pytest.raises(UserError, match="is named 2 times"):
        read(a, f"again={a}")


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a") / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    records, notes = read_records(path)
    assert [one["step"] for one in records] == list(range(1, 40))
    assert notes == ["The last line of its metrics is torn and was left out."]
    path.write_bytes(whole[:-1])  # nothing but the end of the line is missing
    assert len(read_records(path)[0]) == 40


def test_steps_that_were_done_again_count_once(tmp_path: Path) -> None:
    """As when lines of two processes were put together by hand."""
    lines = [record(step) for step in (1, 2, 3, 4, 5)] + [
        {"step": step, "loss": 70.0 + step} for step in (3, 4)
    ]
    records, notes = read_records(write_run(tmp_path / "a", lines) / "metrics.jsonl")
    assert [one["step"] for one in records] == [1, 2, 3, 4]
    assert [one["loss"] for one in records[2:]] == [73.0, 74.0]
    assert len(notes) == 1
    assert "did them again" in notes[0]


BROKEN = {
    "empty": (b"", "holds no step yet"),
    "torn in the middle": (b'{"step": 1}\n{"st\n{"step": 3}\n', ":2 is not a line of metrics"),
    "no object": (b'[1]\n{"step": 2}\n', ":1 is not a line of metrics"),
    "no step": (b'{"loss": 1}\n{"step": 2}\n', ":1 is not a line of metrics"),
    "a step of 400 digits": (b'{"step": 1%s}\n{"step": 2}\n' % (b"0" * 399), ":1 is not a line"),
    "no UTF-8": (b'\xff\xfe\n{"step": 2}\n', ":1 is not a line of metrics"),
    "nonfinite is a number": (b'{"step": 4, "nonfinite": 5}\n', "nonfinite of step 4 is no list"),
    "nonfinite is a word": (b'{"step": 1, "nonfinite": "loss"}\n', "is no list of metrics"),
    "nonfinite is null": (b'{"step": 1, "nonfinite": null}\n', "is no list of metrics"),
    "nonfinite of lists": (b'{"step": 1, "nonfinite": [["loss"]]}\n', "is no list of metrics"),
    "nothing but a torn line": (b'{"step": 1, "lo', "holds no step yet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_metrics(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    path = write_run(tmp_path / "a") / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path.parent)
    assert "\n" not in str(caught.value)


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither metrics.jsonl nor results.json"):
        find(str(tmp_path))
    with pytest.raises(UserError, match="nowhere does not exist"):
        find("nowhere")
    folder = write_run(tmp_path / "a")
    (folder / "config.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="is not readable YAML"):
        read(folder)
    (folder / "config.yaml").write_text("- 1")
    with pytest.raises(UserError, match="not a run's configuration"):
        read(folder)


def test_oddities_are_told(tmp_path: Path) -> None:
    bad = {**record(7), "loss": None, "ce": None, "nonfinite": ["loss", "ce"]}
    lines = [record(4), record(5), bad, {**record(8), "loss": None, "nonfinite": ["loss"]}]
    notes = " ".join(read(write_run(tmp_path / "a", lines))[0].notes)
    assert "It has done 8 of 40 steps" in notes
    assert "Its metrics begin at step 4" in notes
    assert "lack 1 step on the way" in notes
    assert "ce (1), loss (2)" in notes
    bare = read(write_run(tmp_path / "b", config=None))[0]
    assert "no config.yaml" in bare.notes[0]
    assert bare.objective == "unknown"


def test_only_what_differs_is_listed(tmp_path: Path) -> None:
    runs = read(
        write_run(tmp_path / "a", run_dir="a"),
        write_run(tmp_path / "b", run_dir="b", objective="nll", optim={"lr": 2e-5}),
        write_run(tmp_path / "c", config=None),
    )
    assert differences(runs[:2]) == [
        ("objective", ["deft", "nll"]),
        ("optim.lr", ["1e-05", "2e-05"]),
        ("optim.warmup_steps", ["null", "-"]),
    ]
    # of the run without a configuration nothing is known
    assert [key for key, _ in differences(runs)] == [key for key, _ in differences(runs[:2])]
    assert differences(runs[:1]) == []


def test_lines_of_a_real_file_are_read_as_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert read(folder)[0].records == [json.loads(line) for line in lines]
