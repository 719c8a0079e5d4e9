"""Whole evaluations of real (tiny) models, interrupted, continued, enlarged and scored again."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_deft.cli import main
from megatron_deft.errors import UserError
from megatron_deft.evaluation import run
from megatron_deft.evaluation.engines import Generation, Sampling, make_engine
from megatron_deft.evaluation.figfont import TASK, jaro_winkler
from megatron_deft.evaluation.prompts import render_prompt
from megatron_deft.evaluation.results import describe
from megatron_deft.evaluation.run import Choices
from megatron_deft.evaluation.scoring import score
from tests.evaluation.conftest import WORDS


def evaluate(
    models: Sequence[Path], file: Path, out: Path | None = None, **options: Any
) -> dict[str, Any]:
    apart = {key: options.pop(key) for key in ("names", "progress", "workers") if key in options}
    return run.evaluate(TASK, models, [file], out, Choices(**options), **apart)


def test_two_models_side_by_side(
    model: Path, other_model: Path, messages_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    results = evaluate([model, other_model], messages_file, out, names=["base", "deft"])
    printed = describe(results)
    assert printed.startswith("FigFont: 11 questions, greedy, 5 new tokens, prompt chat;")
    assert [line.split()[0] for line in printed.splitlines()[4:]] == ["base", "deft", "-"]
    assert json.loads((out / "results.json").read_text()) == results
    assert results["settings"]["max_new_tokens"] == 5
    assert {"torch", "transformers"} <= set(results["versions"])
    for name in ("base", "deft"):
        header, *records = map(
            json.loads, (out / f"generations_{name}.jsonl").read_text().splitlines()
        )
        assert (header["task"], header["max_new_tokens"]) == ("figfont", 5)
        assert sorted(record["index"] for record in records) == list(range(11))
        mean = sum(jaro_winkler(r["output"], r["gold"]["answer"]) for r in records) / 11
        entry = results["models"][name]
        assert entry["scores"]["jaro_winkler"]["mean"] == pytest.approx(mean)
        assert entry["sets"] == {"figfont": entry["scores"]}
        assert entry["samples"] == 11
        engine = make_engine("transformers", entry["path"], 1)
        for record, question in zip(
            sorted(records, key=lambda record: record["index"]),
            TASK.read([str(messages_file)]),
            strict=True,
        ):
            prompt = engine.tokenizer(render_prompt(engine.tokenizer, question, None))["input_ids"]
            (answer,) = engine.generate([prompt], Sampling(5))
            assert (record["output"], record["gold"]) == (answer.text, question.gold)
    assert list(tmp_path.iterdir()) == [out]


def test_the_results_file_may_be_named(
    readers: Callable[..., list["Reader"]], model: Path, messages_file: Path, tmp_path: Path
) -> None:
    readers((set(),))
    results = evaluate([model], messages_file, tmp_path / "new" / "scores.json", progress=False)
    assert json.loads((tmp_path / "new" / "scores.json").read_text()) == results
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["generations_first.jsonl", "scores.json"]


class Reader:
    """An engine that reads the art, but for the questions it is told to miss."""

    name, dtype = "reader", "fp32"

    def __init__(self, tokenizer: Any, misses: set[int], fails_after: int | None = None) -> None:
        self.tokenizer, self.misses, self.fails_after = tokenizer, misses, fails_after
        self.asked: list[tuple[int, int]] = []

    def generate(
        self, prompts: Sequence[Any], sampling: Any, streams: Sequence[int] | None = None
    ) -> Iterator[Generation]:
        assert streams is not None
        assert len(set(streams)) == len(streams)
        for stream in streams:
            if len(self.asked) == self.fails_after:
                raise KeyboardInterrupt
            index, sample = stream & 0xFFFFFFFF, stream >> 32
            self.asked.append((index, sample))
            is_right = index not in self.misses and sample % 2 == 0
            yield Generation(WORDS[index] if is_right else "no", 2, True)

    def close(self) -> None:
        pass


@pytest.fixture
def readers(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Reader]]:
    """Let evaluate load these engines, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def use(*options: Any) -> list[Reader]:
        loaded = [Reader(tokenizer, *each) for each in options]
        coming = iter(loaded)
        monkeypatch.setattr(run, "make_engine", lambda *_: next(coming))
        return loaded

    return use


def test_known_answers_get_known_scores(
    readers: Callable[..., list[Reader]], model: Path, other_model: Path, messages_file: Path
) -> None:
    readers((set(range(11)),), ({0, 1},))
    models = evaluate([model, other_model], messages_file)["models"]
    assert models["first"]["scores"]["exact"]["mean"] == 0
    second = models["second"]["scores"]["exact"]
    assert second["mean"] == pytest.approx(9 / 11)
    assert second["delta"]["mean"] == pytest.approx(9 / 11)
    assert second["low"] == pytest.approx(0.5230, abs=1e-4)  # Wilson, 9 of 11
    assert models["second"]["generated_tokens"] == 22


def test_several_answers_to_each_question(
    readers: Callable[..., list[Reader]], model: Path, messages_file: Path, tmp_path: Path
) -> None:
    """Every second answer is wrong, and two questions are never answered."""
    readers(({0, 1},))
    options = {"temperature": 1.0, "samples": 4}
    results = evaluate([model], messages_file, tmp_path, **options)
    scores = results["models"]["first"]["scores"]
    assert scores["exact_avg@4"]["mean"] == pytest.approx(9 / 11 / 2)
    # two of four are right: 1 - (2 over 2) / (4 over 2)
    assert scores["exact_pass@2"]["mean"] == pytest.approx(9 / 11 * 5 / 6)
    assert scores["exact_pass@4"]["mean"] == pytest.approx(9 / 11)
    assert "jaro_winkler_pass@2" not in scores
    assert results["settings"]["samples"] == 4
    assert "11 questions x 4 answers, temperature 1, top-p 1" in describe(results)


def test_more_samples_and_questions_keep_those_there_are(
    readers: Callable[..., list[Reader]], model: Path, messages_file: Path, tmp_path: Path
) -> None:
    engines = readers(*[(set(),)] * 3)
    for options in ({"limit": 3, "samples": 2}, {"limit": 3, "samples": 4}, {"samples": 4}):
        evaluate([model], messages_file, tmp_path, temperature=1.0, **options)
    first, second, third = (set(engine.asked) for engine in engines)
    assert first == {(i, s) for i in range(3) for s in range(2)}
    assert second == {(i, s) for i in range(3) for s in (2, 3)}
    assert third == {(i, s) for i in range(3, 11) for s in range(4)}


def test_drawn_answers_differ_and_repeat_themselves(
    model: Path, messages_file: Path, tmp_path: Path
) -> None:
    options = {"temperature": 1.0, "samples": 3, "limit": 4}
    for out, batch_size in (("one", 1), ("other", 5)):
        evaluate([model], messages_file, tmp_path / out, batch_size=batch_size, **options)
    answers = [
        {
            (record["index"], record["sample"]): record["output"]
            for record in map(json.loads, file.read_text().splitlines()[1:])
        }
        for file in sorted(tmp_path.glob("*/generations_first.jsonl"))
    ]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 12
    assert any(len({answers[0][i, s] for s in range(3)}) > 1 for i in range(4))


def test_an_interrupted_run_is_continued(
    readers: Callable[..., list[Reader]], model: Path, messages_file: Path, tmp_path: Path
) -> None:
    (first,) = readers((set(), 4))
    with pytest.raises(KeyboardInterrupt):
        evaluate([model], messages_file, tmp_path)
    assert not (tmp_path / "results.json").exists()
    (second,) = readers((set(),))
    results = evaluate([model], messages_file, tmp_path, batch_size=2)
    assert sorted(first.asked + second.asked) == [(index, 0) for index in range(11)]
    assert len(first.asked) == 4
    assert results["models"]["first"]["scores"]["exact"]["mean"] == 1
    readers()  # nothing is left to ask: no engine is loaded
    assert evaluate([model], messages_file, tmp_path) == results
    assert evaluate([model], messages_file, tmp_path, limit=2)["data"]["samples"] == 2


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("max_new_tokens", 6, "max_new_tokens"), ("seed", 3, "seed"), ("dtype", "bf16", "dtype")],
)
def test_other_settings_begin_anew(
    readers: Callable[..., list[Reader]],
    model: Path,
    messages_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: Any,
    named: str,
) -> None:
    _, second = readers((set(),), (set(),))
    evaluate([model], messages_file, tmp_path)
    evaluate([model], messages_file, tmp_path, **{option: value})
    assert f"begun anew, since {named} changed" in capsys.readouterr().err
    assert len(second.asked) == 11


def test_another_model_in_the_same_place_begins_anew(
    readers: Callable[..., list[Reader]], model: Path, messages_file: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    _, second = readers((set(),), ({1},))
    evaluate([copy], messages_file, tmp_path / "out")
    (copy / "model.safetensors").write_bytes(b"other")
    evaluate([copy], messages_file, tmp_path / "out")
    assert len(second.asked) == 11


def test_other_data_begin_anew(
    readers: Callable[..., list[Reader]],
    model: Path,
    messages_file: Path,
    released_file: Path,
    tmp_path: Path,
) -> None:
    _, second = readers((set(),), (set(),))
    evaluate([model], messages_file, tmp_path)
    evaluate([model], released_file, tmp_path)  # the same words under another system turn
    assert len(second.asked) == 11


def test_answers_are_scored_again_without_a_model(
    readers: Callable[..., list[Reader]],
    model: Path,
    other_model: Path,
    messages_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    readers((set(range(5)),), ({0, 1},))
    results = evaluate([model, other_model], messages_file, tmp_path / "out")
    files = [str(tmp_path / "out" / f"generations_{name}.jsonl") for name in ("first", "second")]
    assert score(files) == results
    assert main(["evaluate", "score", *files, "--out", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == results
    assert json.loads((tmp_path / "again" / "results.json").read_text()) == results
    assert main(["evaluate", "score", files[1]]) == 0
    assert "81.8" in capsys.readouterr().out  # 9 of 11


def test_questions_that_are_not_asked_any_more_are_not_scored(
    readers: Callable[..., list[Reader]], model: Path, messages_file: Path, tmp_path: Path
) -> None:
    readers((set(),))
    evaluate([model], messages_file, tmp_path, limit=6)
    results = evaluate([model], messages_file, tmp_path, limit=2)
    assert score([tmp_path / "generations_first.jsonl"]) == results
    assert results["data"]["samples"] == 2


def test_results_of_another_task_are_not_replaced(
    readers: Callable[..., list[Reader]], model: Path, messages_file: Path, tmp_path: Path
) -> None:
    readers()  # nothing may be asked before
    target = tmp_path / "results.json"
    for content, message in (
        ('{"task": "medical"}', "holds results of medical, not of figfont: name another --out"),
        ("[1]", "holds something else"),
        ("no", "name another --out"),
    ):
        target.write_text(content)
        with pytest.raises(UserError, match=message):
            evaluate([model], messages_file, tmp_path)
        assert target.read_text() == content
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        evaluate([model], messages_file, tmp_path / "folder.json")


def test_damaged_answers_are_named(
    readers: Callable[..., list[Reader]], model: Path, messages_file: Path, tmp_path: Path
) -> None:
    readers((set(),))
    evaluate([model], messages_file, tmp_path)
    file = tmp_path / "generations_first.jsonl"
    header, first, *rest = map(json.loads, file.read_text().splitlines())
    plan = header["plan"]
    for lines, message in (
        ([{**header, "plan": {**plan, "path": None}}, first], "its plan has no right path"),
        ([{**header, "plan": {**plan, "samples": "1"}}, first], "its plan has no right samples"),
        ([{**header, "plan": 3}, first], "its header has no right plan"),
        ([{k: v for k, v in header.items() if k != "data"}, first], "no right data"),
        ([header, {**first, "output": None}], "its answer has no right output"),
        ([header, {**first, "gold": 3}], "its answer has no right gold"),
        ([header, {k: v for k, v in first.items() if k != "finished"}], "no right finished"),
    ):
        file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *rest]))
        with pytest.raises(UserError, match=f"{message}.*name one that `evaluate` wrote"):
            score([file])


def test_an_unfinished_file_is_scored_only_where_asked_for(
    readers: Callable[..., list[Reader]],
    model: Path,
    other_model: Path,
    messages_file: Path,
    tmp_path: Path,
) -> None:
    readers((set(),), (set(), 4))
    with pytest.raises(KeyboardInterrupt):
        evaluate([model, other_model], messages_file, tmp_path)
    files = [tmp_path / f"generations_{name}.jsonl" for name in ("first", "second")]
    with pytest.raises(UserError, match="7 of 11 questions are not answered"):
        score(files)
    results = score(files, partial=True)
    assert [entry["samples"] for entry in results["models"].values()] == [4, 4]


def test_files_that_do_not_go_together(
    readers: Callable[..., list[Reader]], model: Path, messages_file: Path, tmp_path: Path
) -> None:
    readers((set(),), (set(),))
    evaluate([model], messages_file, tmp_path / "one", names=["a"])
    evaluate([model], messages_file, tmp_path / "two", names=["b"], max_new_tokens=7)
    files = [tmp_path / "one" / "generations_a.jsonl", tmp_path / "two" / "generations_b.jsonl"]
    nothing = tmp_path / "generations_c.jsonl"
    nothing.write_text("")
    for given, message in (
        (files, "b: max_new_tokens differ from a's"),
        ([files[0], files[0]], "two files are of a"),
        ([nothing], "not a file of generations"),
        ([tmp_path / "absent.jsonl"], "no such file"),
        ([], "no file to score"),
    ):
        with pytest.raises(UserError, match=message):
            score(given)


def test_bad_options(model: Path, messages_file: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"models": []}, "no model"),
        ({"models": [tmp_path / "absent"]}, "no such folder"),
        ({"names": ["a", "b"]}, "2 names for 1 models"),
        ({"names": ["a/b"]}, "letters, digits"),
        ({"models": [model, model]}, "two models share a name"),
        ({"limit": 0}, "limit=0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"prompt_type": "alpaca"}, "prompt_type=alpaca: one of chat, qwen_prompt"),
        ({"prompt_type": "llama_prompt"}, "no single token of tokenizer.*prompt-type"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"engine": "tgi"}, "engine=tgi"),
        ({"samples": 2}, "samples=2 at temperature 0"),
        ({"samples": 0, "temperature": 1.0}, "samples=0"),
    ):
        arguments: dict[str, Any] = {"models": [model], "file": messages_file, **options}
        with pytest.raises(UserError, match=message):
            evaluate(**arguments)


def test_a_model_without_a_chat_template(model: Path, messages_file: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    file = copy / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["chat_template"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="no chat template"):
        evaluate([copy], messages_file)
    assert evaluate([copy], messages_file, prompt_type="qwen_prompt")["models"]
