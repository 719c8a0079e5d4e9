"""Real tiny models on real lm-eval tasks of the tests' own, offline: scores against a second
computation, differences, what a rerun asks, and what a user is told.
"""

import argparse
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_deft.errors import UserError
from megatron_deft.evaluation import general
from megatron_deft.evaluation.general import describe, evaluate
from megatron_deft.evaluation.general_arguments import add_general_arguments, run_general
from megatron_deft.evaluation.harness import _known, check_installed
from megatron_deft.evaluation.statistics import bootstrap
from tests.evaluation.general_tasks import (
    choice_task,
    expected_correct,
    write_task,
    write_tasks,
)

pytest.importorskip("accelerate")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of data sets of our own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """No test may reach for the network."""
    tried: list[Any] = []
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            tried.append(address)
            raise ConnectionRefusedError(f"a test reached for {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield tried
    assert not tried


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder


def test_two_models_on_two_tasks(
    model: Path, other_model: Path, tasks: Path, tmp_path: Path
) -> None:
    answers = {"tiny_long": [0, 1, 2] * 4, "tiny_short": [2, 2, 1, 0]}
    results = evaluate(
        [model, other_model], list(answers), tasks, out=tmp_path, names=["base", "deft"]
    )
    assert json.loads((tmp_path / "results.json").read_text()) == results
    means, deltas = {}, {}
    for name, gold in answers.items():
        theirs = expected_correct(model, gold, True)
        ours = expected_correct(other_model, gold, True)
        base, deft = (
            results["models"][label]["sets"][name]["acc_norm"] for label in ("base", "deft")
        )
        assert base["mean"] == pytest.approx(np.mean(theirs))
        assert deft["mean"] == pytest.approx(np.mean(ours))
        error = np.std(ours, ddof=1) / len(ours) ** 0.5
        assert deft["low"] == pytest.approx(max(np.mean(ours) - 1.959964 * error, 0))
        assert deft["high"] == pytest.approx(min(np.mean(ours) + 1.959964 * error, 1))
        paired = bootstrap([a - b for a, b in zip(ours, theirs, strict=True)])
        assert deft["delta"] == pytest.approx(vars(paired))
        assert "delta" not in base
        means[name], deltas[name] = np.mean(ours), deft["delta"]["mean"]
        every = json.loads((tmp_path / "general_deft.json").read_text())["tasks"][name]["all"]
        plain = expected_correct(other_model, gold, False)
        assert every["acc,none"] == pytest.approx(np.mean(plain))
    assert len(set(means.values())) == 2, "the two tasks' scores must tell their mean apart"
    overall = results["models"]["deft"]["scores"]["acc_norm"]
    assert overall["mean"] == pytest.approx(np.mean(list(means.values())))
    assert overall["delta"]["mean"] == pytest.approx(np.mean(list(deltas.values())))
    assert overall["low"] < overall["mean"] < overall["high"]
    assert results["models"]["base"]["samples"] == 16
    assert results["data"]["tasks"]["tiny_long"]["samples"] == 12
    assert results["task"] == "general"
    assert {"lm_eval", "torch"} <= set(results["versions"])
    lines = describe(results).splitlines()
    assert lines[0] == "General tests: percent [95%]"
    assert lines[2].split("  ")[0] == "model"
    assert "tiny_long acc_norm" in lines[2]
    assert "mean of tasks" in lines[2]
    assert [line.split()[0] for line in lines[4:]] == ["base", "deft", "-"]
    assert f"{100 * overall['mean']:.1f}" in lines[5]


def test_what_is_no_mean_over_questions(model: Path, other_model: Path, tasks: Path) -> None:
    names = ["tiny_texts", "tiny_words", "tiny_short"]
    results = evaluate([model, other_model], names, tasks)
    first, second = (results["models"][label] for label in ("first", "second"))
    perplexity = second["sets"]["tiny_texts"]["word_perplexity"]
    asked = results["data"]["tasks"]
    assert (asked["tiny_texts"]["fraction"], asked["tiny_texts"]["higher_is_better"]) == (
        False,
    ) * 2
    assert 1 < perplexity["low"] < perplexity["mean"] < perplexity["high"]
    base = first["sets"]["tiny_texts"]["word_perplexity"]["mean"]
    assert perplexity["delta"]["mean"] == pytest.approx(perplexity["mean"] - base)
    assert 0 <= second["sets"]["tiny_words"]["exact_match"]["mean"] <= 1
    parts = [
        second["sets"]["tiny_words"]["exact_match"]["mean"],
        second["sets"]["tiny_short"]["acc_norm"]["mean"],
    ]
    assert second["scores"]["average"]["mean"] == pytest.approx(np.mean(parts))
    assert second["scores"]["word_perplexity"] == perplexity
    printed = describe(results)
    assert "tiny_texts word_perplexity (no percent, less is better)" in printed
    assert f"{perplexity['mean']:.1f} [" in printed


@pytest.mark.parametrize("kind", ["weighted", "even"])
def test_a_group_with_a_mean_is_one_score(
    kind: str, model: Path, other_model: Path, tasks: Path
) -> None:
    results = evaluate([model, other_model], [f"tiny_{kind}"], tasks, progress=False)
    sizes = {"tiny_long": ([0, 1, 2] * 4, 12), "tiny_short": ([2, 2, 1, 0], 4)}
    means = {
        folder: [np.mean(expected_correct(folder, gold, False)) for gold, _ in sizes.values()]
        for folder in (model, other_model)
    }
    weights = [size / 16 for _, size in sizes.values()] if kind == "weighted" else [0.5, 0.5]
    expected = {folder: float(np.dot(weights, each)) for folder, each in means.items()}
    score = results["models"]["second"]["sets"][f"tiny_{kind}"]["acc"]
    assert score["mean"] == pytest.approx(expected[other_model])
    assert score["delta"]["mean"] == pytest.approx(expected[other_model] - expected[model])
    assert score["delta"]["low"] < score["delta"]["mean"] < score["delta"]["high"]


def test_groups_without_a_mean_and_files(model: Path, tasks: Path) -> None:
    for names in (["tiny_plain"], [str(tasks / "tiny_long.yaml"), "tiny_short"]):
        results = evaluate([model], names, tasks, limit=2, progress=False)
        assert list(results["data"]["tasks"]) == ["tiny_long", "tiny_short"]
        assert results["data"]["tasks"]["tiny_long"]["samples"] == 2


def test_patterns(tasks: Path) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = _known(manager, ["tiny_[ls]*", "tiny_long"], tasks)
    assert found == ["tiny_long", "tiny_short"]


def test_examples_before_a_question(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["tiny_long", "tiny_short"]
    results = evaluate([model], names, tasks, num_fewshot=2, limit=3, out=tmp_path)
    assert [task["fewshot"] for task in results["data"]["tasks"].values()] == [2, 0]
    assert "tiny_short: asked without examples" in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sets that models are asked for."""
    names: list[str] = []
    measure = general.measure

    def noted(model: Any, tasks: Any, *options: Any) -> dict[str, Any]:
        if "stop" in names:
            raise KeyboardInterrupt
        names.append(tasks.name)
        return measure(model, tasks, *options)

    monkeypatch.setattr(general, "measure", noted)
    return names


def test_a_rerun_asks_only_what_is_missing(
    model: Path,
    other_model: Path,
    tasks: Path,
    tmp_path: Path,
    asked: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out" / "scores.json"
    first = evaluate([model], ["tiny_short"], tasks, out=out)
    both = evaluate([model, other_model], ["tiny_short", "tiny_long"], tasks, out=out)
    assert asked == ["tiny_short", "tiny_long", "tiny_short", "tiny_long"]
    assert "first: " in (told := capsys.readouterr().err)
    assert "has 1 of 2 tasks: not asked again" in told
    assert (
        both["models"]["first"]["sets"]["tiny_short"]
        == first["models"]["first"]["sets"]["tiny_short"]
    )
    again = evaluate([model, other_model], ["tiny_short", "tiny_long"], tasks, out=out)
    assert again == both
    assert len(asked) == 4
    evaluate([model], ["tiny_short"], tasks, out=out, limit=2)
    assert len(asked) == 5
    assert "begun anew, since limit changed" in capsys.readouterr().err


def test_an_interrupted_run_keeps_whole_tasks(
    model: Path, tasks: Path, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load_model = general.load_model
    monkeypatch.setattr(
        general, "load_model", lambda *options: loads.append(1) or load_model(*options)
    )
    names = ["tiny_short", "tiny_long"]
    write = general._write

    def stop(file: Path, content: Any, indent: int | None = 2) -> None:
        write(file, content, indent)
        asked.append("stop")

    monkeypatch.setattr(general, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate([model], names, tasks, out=tmp_path)
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(general, "_write", write)
    asked.clear()
    evaluate([model], names, tasks, out=tmp_path)
    assert asked == ["tiny_long"]
    evaluate([model], names, tasks, out=tmp_path)
    assert len(loads) == 2, "nothing is left to ask: no model is loaded"


def test_other_questions_are_asked_anew(model: Path, tmp_path: Path, asked: list[str]) -> None:
    choice_task(tmp_path, "tiny_mine", [0, 1])
    evaluate([model], ["tiny_mine"], tmp_path, out=tmp_path / "out")
    choice_task(tmp_path, "tiny_mine", [0, 2])
    results = evaluate([model], ["tiny_mine"], tmp_path, out=tmp_path / "out")
    assert asked == ["tiny_mine"] * 2
    score = results["models"]["first"]["sets"]["tiny_mine"]["acc_norm"]["mean"]
    assert score == pytest.approx(np.mean(expected_correct(model, [0, 2], True)))


def test_a_damaged_file_is_named(model: Path, tasks: Path, tmp_path: Path) -> None:
    for text, message in (("{", "is not readable JSON"), ("[]", "not a file of general scores")):
        (tmp_path / "general_first.json").write_text(text)
        with pytest.raises(UserError, match=message):
            evaluate([model], ["tiny_short"], tasks, out=tmp_path)


def test_the_chat_template_is_used_when_asked_for(model: Path, tmp_path: Path) -> None:
    gold = [0] * 12
    choice_task(tmp_path, "tiny_chat", gold)
    results = evaluate([model], ["tiny_chat"], tmp_path, out=tmp_path, apply_chat_template=True)
    scores = json.loads((tmp_path / "general_first.json").read_text())["tasks"]["tiny_chat"]
    assert scores["values"] == expected_correct(model, gold, True, chat=True)
    assert scores["values"] != expected_correct(model, gold, True)
    assert results["settings"]["apply_chat_template"]
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no chat template"):
        evaluate([copy], ["tiny_chat"], tmp_path, apply_chat_template=True)


def test_mistakes_are_one_line(model: Path, tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "code.yaml").write_text(
        (tasks / "tiny_long.yaml").read_text().replace("task: tiny_long", "task: tiny_code")
        + "unsafe_code: true\n"
    )
    (tmp_path / "gone.yaml").write_text(
        (tasks / "tiny_long.yaml")
        .read_text()
        .replace("task: tiny_long", "task: tiny_gone")
        .replace("tiny_long.jsonl", "gone.jsonl")
    )
    for options, message in (
        ({"tasks": ["tiny_code"], "include_path": tmp_path}, "tiny_code runs the code"),
        ({"tasks": ["tiny_gone"], "include_path": tmp_path}, r"tiny_gone: lm-eval cannot load it"),
        ({"tasks": ["tiny_weighted", "tiny_short"]}, "tiny_short is asked for twice"),
        ({"tasks": []}, "no task"),
        ({"include_path": tmp_path / "absent"}, "no such folder"),
        ({"limit": 0}, "limit=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_fewshot": -1}, "num_fewshot=-1"),
        ({"dtype": "fp8"}, "dtype=fp8: one of auto, fp32, bf16"),
        ({"engine": "tgi"}, "engine=tgi"),
        ({"models": [tmp_path / "absent"]}, "no such folder"),
        ({"names": ["a", "b"]}, "2 names for 1 models"),
    ):
        arguments: dict[str, Any] = {
            "models": [model], "tasks": ["tiny_long"], "include_path": tasks, **options,
        }  # fmt: skip
        with pytest.raises(UserError, match=message) as caught:
            evaluate(**arguments)
        assert "\n" not in str(caught.value)


def test_with_a_datasets_that_runs_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setattr(metadata, "version", lambda name: {"datasets": "3.6.0"}[name])
    with pytest.raises(UserError, match=r"datasets 3.6.0 may run code .* 'datasets>=4'"):
        check_installed()


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=re.escape("pip install 'megatron-deft[general]'")):
        evaluate([model], ["mmlu"])


def test_names_that_are_none_are_told_with_near_ones(model: Path, tmp_path: Path) -> None:
    choice_task(tmp_path, "tiny_long", [0])
    (tmp_path / "torn.yaml").write_text("task: [tiny_torn\n")
    with pytest.raises(UserError) as caught:
        evaluate([model], ["tiny_lung", "mmlu_anatomi", "tiny_torn", "xqz*"], tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "no task tiny_lung (did you mean tiny_long" in message
    assert "mmlu_anatomi (did you mean mmlu_anatomy" in message
    assert "xqz*; " in message
    assert re.search(r"torn\.yaml is not readable YAML \(while parsing a flow sequence", message)


def test_a_task_of_the_hub_without_a_network_is_one_line(model: Path, tmp_path: Path) -> None:
    """In a process of its own: the Hub's packages read their settings when they are imported."""
    write_task(
        tmp_path, "tiny_hub", tmp_path / "none", dataset_path="allenai/ai2_arc",
        dataset_name="ARC-Easy", output_type="generate_until", dataset_kwargs={},
    )  # fmt: skip
    code = (
        "import sys\n"
        "from megatron_deft.errors import UserError\n"
        "from megatron_deft.evaluation.general import evaluate\n"
        "try: evaluate([sys.argv[1]], ['tiny_hub'], sys.argv[2])\n"
        "except UserError as error: sys.exit(f'ours: {error}')\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    found = subprocess.run(
        [sys.executable, "-c", code, str(model), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert found.stderr.count("\n") == 2, found.stderr
    line = found.stderr.splitlines()[-1]
    assert line.startswith("ours: task tiny_hub: lm-eval cannot load it: ")
    assert "no network" in line
    assert "Traceback" not in found.stderr
    assert found.stdout == ""


def test_the_command(
    model: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_general_arguments(parser)
    line = f"{model} --tasks tiny_short,tiny_long --include-path {tasks} --limit 2 --names base"
    args = parser.parse_args([*line.split(), "--out", str(tmp_path), "--num-fewshot", "0"])
    assert run_general(args) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["models"]) == ["base"]
    assert results["settings"] | {"limit": 2, "num_fewshot": 0} == results["settings"]
    assert capsys.readouterr().out.startswith("General tests: the first 2 questions of each, ")
    assert parser.parse_args(["m", "--tasks", "t"]).batch_size == 8


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_vllm_asked_for_and_absent(model: Path, tasks: Path) -> None:
    with pytest.raises(UserError, match=r"engine vllm: .*vllm.* pass another --engine"):
        evaluate([model], ["tiny_long"], tasks, engine="vllm")
