"""The file of answers: continued, begun anew, refused."""

import os
from pathlib import Path

import pytest

from megatron_deft.errors import UserError
from megatron_deft.evaluation.log import (
    GenerationLog,
    label_of,
    log_path,
    model_identity,
    read_log,
)


def test_the_log_is_continued_without_its_torn_line(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    log = GenerationLog(file, {"model": "a"})
    for index in range(3):
        log.add({"index": index, "sample": 0, "output": "x\u2028y"})
    file.write_bytes(file.read_bytes()[:-5])
    again = GenerationLog(file, {"model": "a"})
    assert sorted(again.records) == [(0, 0), (1, 0)]
    assert again.changed == []
    again.add({"index": 2, "sample": 0, "output": "new"})
    assert GenerationLog(file, {"model": "a"}).records[2, 0]["output"] == "new"


def test_the_log_of_another_run_is_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    GenerationLog(file, {"model": "a", "seed": 1}).add({"index": 0, "sample": 0})
    other = GenerationLog(file, {"model": "b", "seed": 1})
    assert (other.records, other.changed) == ({}, ["model"])
    assert GenerationLog(file, {"model": "b", "seed": 1}).records == {}


@pytest.mark.parametrize("content", ["no json\n", "[1]\n", '{"model": "a"}\n{"index": 0}\n'])
def test_a_file_that_is_no_log_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match="not a file of generations"):
        GenerationLog(file, {})
    assert file.read_text() == content


def test_model_identity_follows_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = model_identity(tmp_path)
    (tmp_path / "notes.txt").write_text("no part of the model")
    assert model_identity(tmp_path) == before
    os.utime(tmp_path / "model.safetensors", (1, 1))  # as in a copy
    assert model_identity(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert model_identity(tmp_path) != before


def test_answers_are_set_aside_before_others_come(tmp_path: Path) -> None:
    file = log_path(tmp_path, "base")
    for seed in range(3):
        log = GenerationLog(file, {"seed": seed})
        log.add({"index": seed, "sample": 0})
        GenerationLog(file, {"seed": seed})  # continued: nothing is set aside
    assert log.old == tmp_path / "generations_base.old-2.jsonl"
    kept = [tmp_path / f"generations_base.old-{n}.jsonl" for n in (1, 2)]
    assert [list(read_log(path, "")[1]) for path in [*kept, file]] == [[(n, 0)] for n in range(3)]
    GenerationLog(file, {"seed": 3})
    assert GenerationLog(file, {"seed": 4}).old is None  # there was no answer


def test_the_plan_may_change(tmp_path: Path) -> None:
    file = log_path(tmp_path, "base")
    GenerationLog(file, {"model": "a"}, {"samples": 1}).add({"index": 0, "sample": 0})
    assert GenerationLog(file, {"model": "a"}, {"samples": 2}).records
    header, records = read_log(file, "")
    assert (header, list(records)) == ({"model": "a", "plan": {"samples": 2}}, [(0, 0)])
    assert label_of(file) == "base"
