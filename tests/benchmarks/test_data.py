"""`megatron-deft bench data` on a few rows: what it writes, and that wrong results are seen."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_deft.benchmarks import corpus, data, data_parts, processes, tokenising
from megatron_deft.benchmarks.data import judge, loader_row, verdict
from megatron_deft.benchmarks.tokenising import summary
from megatron_deft.cli import main
from megatron_deft.data import packing
from megatron_deft.data.packing import Packs

ROWS, SAMPLES, STEPS = 40, 3000, 5
SECTIONS = {"tokenising": 3, "loader": 1, "opening": 4, "packing": 2}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the whole command; all but training stays in this process, which takes seconds."""
    work = tmp_path_factory.mktemp("bench")
    path, problems = work / "result.json", work / "problems.jsonl"
    rows = [
        {"problem": f"What is {i} + 1?", "solution": f"It is $\\boxed{{{i + 1}}}$." * (i % 9 + 1)}
        for i in range(200)
    ]
    problems.write_text("\n".join(map(json.dumps, rows)))
    started = processes._python

    def here(module: str, *arguments: str) -> str:
        if module != "megatron_deft":
            return json.dumps(data_parts.PARTS[arguments[0]](**json.loads(arguments[1])))
        if arguments[0] == "train":
            return started(module, *arguments)
        assert main(arguments) == 0
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_python", here)
        patch.setattr(tokenising, "available_cores", lambda: 1)
        patch.setattr(data, "LOADERS", [(1, 0)])
        sizes = {"rows": ROWS, "samples": SAMPLES, "steps": STEPS, "repetitions": 2}
        options = [word for name, n in sizes.items() for word in (f"--{name}", str(n))]
        where = ["--dir", str(work), "--json", str(path), "--math", str(problems)]
        assert main(["bench", "data", *options, *where]) == 0
    assert sorted(entry.name for entry in work.iterdir()) == ["problems.jsonl", "result.json"]
    return dict(json.loads(path.read_text()))


def test_every_section_and_where_it_was_made(result: dict[str, Any]) -> None:
    assert {name: len(result[name]) for name in SECTIONS} == SECTIONS
    assert {"machine", "versions", "commit", "date", "method", "load"} <= set(result)
    assert result["versions"]["torch"] == torch.__version__
    assert not any(row["wrong"] for name in SECTIONS for row in result[name])
    assert verdict(result, strict=False) == 0
    assert [line["name"] for line in result["budgets"]] == [
        *["tokenising: share of encode_batch's rate"] * 3,
        "training: share of time waiting",
        *["open and first batch, seconds", "open and first batch, MB"] * 2,
        "packing at 2048: FigFont, efficiency",
        "packing at 2048: math, efficiency",
    ]


def test_tokenising_is_of_the_same_texts(result: dict[str, Any]) -> None:
    for row, times in zip(result["tokenising"], (1, 1, 5), strict=True):
        assert row["rows"] == ROWS * times
        assert row["bytes"] > row["tokens"] > 50 * row["rows"]
        assert row["tokens_per_row"] == row["tokens"] / row["rows"]
        assert len(row["repetitions"]) == 2
        assert all(seconds > 0 for times in row["repetitions"] for seconds in times.values())


def test_the_loader_fills_rows_of_documents(result: dict[str, Any]) -> None:
    (row,) = result["loader"]
    assert row["steps"] == STEPS - data.LEFT_OUT
    assert 0 < row["share"] <= row["longest_share"] < 1
    assert row["share"] == pytest.approx(row["data_seconds"] / row["step_seconds"])
    assert 0.5 * data.LENGTH < row["tokens_per_step"] <= data.LENGTH


def test_opening_takes_memory_that_is_measured(result: dict[str, Any]) -> None:
    for row in result["opening"]:
        assert row["samples"] == SAMPLES
        assert (row["pack_seconds"] is None) == row["name"].startswith("not packed")
        assert row["seconds"] >= row["open_seconds"] + row["first_batch_seconds"]
        assert row["before_bytes"] > 2**26
        assert row["peak_grown_bytes"] >= row["grown_bytes"]
    assert result["opening"][0]["rows"] == SAMPLES > result["opening"][2]["rows"]


def test_packing_counts_every_sample(result: dict[str, Any]) -> None:
    figfont, math = result["packing"]
    assert (figfont["name"], figfont["samples"]) == ("FigFont", ROWS)
    assert (math["name"], math["samples"]) == ("math", 200)
    for row in (figfont, math):
        assert 0 < row["efficiency"] <= 1
        assert row["longest"] < data.LENGTH


def test_rates_are_without_the_start() -> None:
    times = [{"start": 5.0, "command": 25.0, "encode_batch": 19.0, "encode_batch_fast": 10.0}]
    row = summary("x", {"rows": 100, "bytes": 9}, times, {4000})
    assert (row["rows_per_second"], row["tokens_per_second"]) == (5, 200)
    assert row["rows_per_second_command"] == 4
    assert (row["ratio"], row["ratio_command"], row["ratio_fast"]) == (0.95, 0.76, 0.5)
    assert row["wrong"] == 0
    assert summary("x", {"rows": 1, "bytes": 9}, times, {4000, 4001})["wrong"] == 1
    short = summary("x", {"rows": 1, "bytes": 9}, [{**times[0], "command": 9.0}], {4000})
    assert (short["ratio"], short["rows_per_second"]) == (None, None), "too few rows to tell"


def test_waiting_is_of_the_later_steps() -> None:
    first = {"data_seconds": 9.0, "step_seconds": 9.0, "tokens": 7, "loss": 1.0}
    later = {"data_seconds": 0.1, "step_seconds": 2.0, "tokens": 7, "loss": 1.0}
    lines = [first] * data.LEFT_OUT + [later] * 2
    row = loader_row(lines, len(lines))
    assert row["share"] == pytest.approx(0.05)
    assert row["wrong"] == 0
    assert loader_row(lines, len(lines) + 1)["wrong"] == 1, "a step is missing"
    assert loader_row([{**line, "loss": None} for line in lines], len(lines))["wrong"] == 1


def test_a_batch_of_other_samples_is_seen() -> None:
    lengths, tokens = data_parts.pattern()
    ends = np.cumsum(lengths, dtype=np.int64)
    rows = [np.array([5, 7]), np.array([data_parts.PATTERN + 2])]
    batch = np.zeros((2, 100), np.int64)
    for row, samples in zip(batch, rows, strict=True):
        place = 0
        for sample in samples % data_parts.PATTERN:
            end, count = ends[sample], lengths[sample] - 1
            row[place : place + count] = tokens[end - count - 1 : end - 1]
            place += count
    assert data_parts._wrong(rows, batch) == 0
    batch[0, 0] += 1
    assert data_parts._wrong(rows, batch) == 1
    assert data_parts._wrong([np.array([6, 8]), np.array([3])], batch) == 3


def test_packs_that_lose_a_sample_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_deft.data.synthetic import make_synthetic_set

    make_synthetic_set(tmp_path / "set", 100, mean_length=50)
    whole = data_parts.pack_set(str(tmp_path / "set"), 256)
    assert whole["wrong"] == 0

    def twice(lengths: Any, capacity: int, seed: int) -> Packs:
        packs = right(lengths, capacity, seed)
        samples = packs.samples.copy()
        samples[0] = samples[-1]
        return Packs(packs.offsets, samples, packs.fill, capacity)

    right = packing.pack
    monkeypatch.setattr(packing, "pack", twice)
    assert data_parts.pack_set(str(tmp_path / "set"), 256)["wrong"] == 1


def report(ratio: float, share: float, seconds: float, size: float, full: float) -> dict[str, Any]:
    opened = {"name": "o", "samples": 9, "seconds": seconds, "peak_grown_bytes": size}
    return {
        "tokenising": [{"name": "t", "ratio": ratio}],
        "loader": [{"name": "l", "micro_batch": 1, "workers": 0, "share": share}],
        "opening": [opened, opened],
        "packing": [{"name": "p", "samples": 9, "efficiency": full}],
    }


def test_budgets_are_judged_on_both_sides_of_their_borders() -> None:
    good, bad = report(0.9, 0.0199, 1.99, 299e6, 0.97), report(0.89, 0.02, 2.0, 300e6, 0.969)
    assert {line["met"] for line in judge(good)} == {True}
    assert {line["met"] for line in judge(bad)} == {False}
    for one, strict, code in ((good, True, 0), (bad, False, 0), (bad, True, 1)):
        assert verdict({**one, "budgets": judge(one)}, strict) == code
    good["opening"][0]["wrong"] = 1
    assert verdict({**good, "budgets": judge(good)}, strict=False) == 1
    good["packing"] = [{"name": "math", "status": "no file given: --math FILE"}]
    assert judge(good)[-1]["met"] is None
    assert judge(good)[-1]["where"] == "no file given: --math FILE"


def test_the_corpus_is_drawn_from_its_seed(tmp_path: Path) -> None:
    chats = list(corpus.Writer(1).conversations(50, 370))
    assert chats == list(corpus.Writer(1).conversations(50, 370))
    assert chats != list(corpus.Writer(2).conversations(50, 370))
    words = [len(text["content"].split()) for chat in chats for text in chat]
    assert 250 < sum(words) / 50 < 500
    assert all(chat[0]["role"] == "user" and chat[-1]["role"] == "assistant" for chat in chats)
    text = " ".join(message["content"] for chat in chats for message in chat).split()
    assert len(set(text)) < len(text) / 2, "words come again, as in a language"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dir", "absent"], "--dir absent: no such folder"),
        (["--json", "."], "--json .: is a folder"),
        (["--math", "absent"], "--math absent: no such file"),
        (["--rows", "0"], "--rows 0: at least"),
        (["--samples", "1"], "--samples 1: at least 256"),
        (["--steps", "3"], "--steps 3: at least 4"),
        (["--repetitions", "0"], "--repetitions 0: at least 1"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["bench", "data", *arguments]) == 2
    assert says in capsys.readouterr().err
