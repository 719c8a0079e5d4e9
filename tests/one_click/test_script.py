"""The script: bash that quotes every word, goes on where it stopped, and runs the whole road."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_deft.evaluation.arguments import EVALUATE
from megatron_deft.one_click.command import main
from tests.one_click.test_recipes import CASES

ODD = 'it\'s "a" $(touch pwned) `touch pwned`; #folder'
STUB = """\
#!{python}
import json, pathlib, sys
root = pathlib.Path.cwd()
with open({log!r}, "a") as log:
    log.write(json.dumps([{name!r}, *sys.argv[1:]]) + chr(10))
words = sys.argv[1:]
makes = {{"prepare": 2, "convert": 3, "download": 5}}
made = next((words[at] for word, at in makes.items() if word in words), None)
if "--out" in words:
    made = words[words.index("--out") + 1] + "/results.json"
if made:
    files = {{"prepare": "info.json", "import": "megatron_deft.json", "export": "config.json"}}
    inner = next((file for word, file in files.items() if word in words), None)
    path = root / made / inner if inner else root / made
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{{}}")
sys.exit(7 if {name!r} == pathlib.Path({fails!r}).name else 0)
"""


class Bash:
    """Runs a script with commands that write down what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.log = folder / "bin", folder / "calls.jsonl"
        self.bin.mkdir()
        self.stubs("")

    def stubs(self, fails: str) -> None:
        for name in ("megatron-deft", "torchrun", "hf"):
            path = self.bin / name
            path.write_text(
                STUB.format(python=sys.executable, log=str(self.log), name=name, fails=fails)
            )
            path.chmod(0o755)

    def __call__(self, script: Path) -> tuple[int, list[list[str]], str]:
        self.log.unlink(missing_ok=True)
        path = f"{self.bin}:/usr/bin:/bin"
        done = subprocess.run(
            ["bash", str(script)], env={"PATH": path}, capture_output=True, text=True, check=False
        )
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        return done.returncode, [json.loads(line) for line in calls], done.stdout + done.stderr


@pytest.fixture
def bash(tmp_path: Path) -> Bash:
    return Bash(tmp_path)


def written(root: Path, *options: str) -> Path:
    script = root / "a.sh"
    assert main([*options, "--work_dir", str(root), "--script", str(script)]) == 0
    assert os.access(script, os.X_OK)
    return script


@pytest.mark.parametrize(("recipe", "dataset", "key"), CASES)
def test_every_recipe_is_bash(recipe: str, dataset: str, key: str, tmp_path: Path) -> None:
    script = written(
        tmp_path, "--recipe", recipe, "--dataset", dataset, "--model_save_name", key,
        "--cuda_visible_devices", "0,1",
    )  # fmt: skip
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert "export CUDA_VISIBLE_DEVICES=0,1" in text
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_steps_of_a_published_experiment(bash: Bash, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    script = written(
        root, "parallel.tensor=2", "--dataset", "math", "--model_save_name", "llama-3.1-8b",
        "--trainer_objective_trans", "GeneralFamily-0.5", "--nproc_per_node", "4",
    )  # fmt: skip
    code, calls, output = bash(script)
    assert code == 2
    assert "data/test/minerva_math.jsonl, a test set" in output
    assert calls == []  # told before anything is trained
    tests = ("minerva_math", "olympiadbench", "aime24", "amc23", "math_oai")
    (root / "data/test").mkdir(parents=True)
    for name in tests:
        (root / f"data/test/{name}.jsonl").touch()
    code, calls, output = bash(script)
    assert code == 0, output
    name = next(path.name for path in (root / "hf/math").iterdir())
    assert name.startswith("llama-3.1-8b-GeneralFamily-0.5-")
    assert calls == [
        ["megatron-deft", "prepare", "math", "data/math"],
        ["hf", "download", "meta-llama/Llama-3.1-8B", "--exclude", "original/*",
         "--local-dir", "base/llama-3.1-8b.partial"],
        ["megatron-deft", "convert", "import", "base/llama-3.1-8b", "weights/llama-3.1-8b",
         "--base", "meta-llama/Llama-3.1-8B"],
        ["torchrun", "--standalone", "--nnodes=1", "--nproc_per_node=4", "-m",
         "megatron_deft.train", str(root / "a.yaml"), "train.resume=auto", "parallel.tensor=2"],
        ["megatron-deft", "convert", "export", f"runs/math/{name}", f"hf/math/{name}"],
        ["megatron-deft", "evaluate", "math", "base/llama-3.1-8b", f"hf/math/{name}",
         "--names", f"base,{name}", "--prompt-type", "llama-base-boxed-with-bos",
         "--data", *(f"data/test/{test}.jsonl" for test in tests),
         "--out", f"results/math/{name}"],
    ]  # fmt: skip
    code, calls, output = bash(script)
    assert (code, calls) == (0, [])
    assert output.count("is there") == 6


def test_a_stopped_script_goes_on(bash: Bash, tmp_path: Path) -> None:
    root = tmp_path / "root"
    script = written(root, "--dataset", "figfont", "--model_save_name", "qwen-2.5-1.5b")
    bash.stubs(fails="torchrun")
    code, calls, _ = bash(script)
    assert code == 7
    assert calls[-1][0] == "torchrun"
    bash.stubs(fails="")
    code, calls, _ = bash(script)
    assert code == 0
    assert [call[0] for call in calls] == ["torchrun", "megatron-deft", "megatron-deft"]


def test_words_of_the_user_are_never_read_by_bash(bash: Bash, tmp_path: Path) -> None:
    root, model, source = tmp_path / ODD, tmp_path / f"hf {ODD}", tmp_path / f"rows {ODD}.jsonl"
    model.mkdir()
    source.touch()
    script = written(
        root, "monitor.experiment=$(touch pwned)'x", "--dataset", "math",
        "--model_save_name", "qwen-2.5-math-7b",
        "--trainer_objective_trans", "DEFT(eps=0)\n", "--model_path", str(model),
        "--data_source", str(source), "--test_data", str(source),
        "--cuda_visible_devices", "0,$(touch pwned)",
    )  # fmt: skip
    subprocess.run(["bash", "-n", str(script)], check=True)
    code, calls, output = bash(script)
    assert code == 0, output
    assert not list(tmp_path.rglob("pwned"))
    by_command = {call[1] if call[0] == "megatron-deft" else call[0]: call for call in calls}
    assert by_command["prepare"][-2:] == ["--source", str(source)]
    assert by_command["torchrun"][-1] == "monitor.experiment=$(touch pwned)'x"
    assert by_command["torchrun"][6] == str(root / "a.yaml")
    assert by_command["evaluate"][3] == str(model)
    assert "hf" not in by_command
    assert str(source) in by_command["evaluate"]


def test_choices_of_ones_own_have_names_of_their_own(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.touch()
    options = ["--dataset", "math", "--model_save_name", "qwen-2.5-math-7b"]
    choices = (
        [], ["optim.lr=1e-5"], ["--smoke"], ["--data_source", str(source)],
        ["--model_path", str(tmp_path)],
    )  # fmt: skip
    runs = set()
    for number, choice in enumerate(choices):
        written(tmp_path / str(number), *choice, *options)
        config = (tmp_path / str(number) / "a.yaml").read_text()
        runs.add(next(line for line in config.splitlines() if line.startswith("run_dir")))
    assert len(runs) == len(choices)


@pytest.mark.parametrize("dataset", ["math", "medical", "figfont"])
def test_smoke_asks_for_few_short_answers(dataset: str, bash: Bash, tmp_path: Path) -> None:
    root, tests = tmp_path / "root", tmp_path / "test.jsonl"
    tests.touch()
    script = written(
        root, "--smoke", "--dataset", dataset, "--model_save_name", "llama-3.1-8b",
        "--test_data", str(tests),
    )  # fmt: skip
    code, calls, output = bash(script)
    assert code == 0, output
    parser = argparse.ArgumentParser()
    EVALUATE[dataset][0](parser)
    assert calls[-1][:3] == ["megatron-deft", "evaluate", dataset]
    args = parser.parse_args(calls[-1][3:])
    assert (args.limit, args.batch_size, args.max_new_tokens) == (2, 2, 32)
    assert args.samples == (2 if dataset == "math" else None)  # the others ask once


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--dataset", "maths"], "--dataset maths: legal for recipe deft are math, medical"),
        (["--recipe", "dft", "--dataset", "medical"], "legal for recipe dft are math"),
        (["--model_save_name", "gpt"], "on math are qwen-2.5-math-1.5b, qwen-2.5-math-7b, llama"),
        (["--model_save_name", "llama-3.2-3b"], "legal for recipe deft on math are"),
        (["--trainer_objective_trans", "SFTT"], "unknown objective 'SFTT': legal are cayley"),
        (["--trainer_objective_trans", "OnlyTopP"], "needs t"),
        (["--nproc_per_node", "0"], "at least 1"),
        (["--nproc_per_node", "3"], "train.global_batch"),
        (["--cuda_visible_devices", "0"], "fewer devices"),
        (["--cuda_visible_devices", "0,0"], "--cuda_visible_devices 0,0 has a device twice"),
        (["--cuda_visible_devices", "0, 0"], "a device twice"),
        (["--cuda_visible_devices", ","], "--cuda_visible_devices ',': name devices, as in 0,1"),
        (["--cuda_visible_devices", "0,1,"], "name devices"),
        (["--cuda_visible_devices", ""], "name devices"),
        (["--cuda_visible_devices", "0,-1"], "name devices"),
        (["--script", "x.yaml"], "--script x.yaml: the run's configuration stands beside"),
        (["--script", "a/x.YML"], "choose another ending, such as .sh"),
        (["--model_path", "nowhere"], "--model_path nowhere: nothing is there"),
        (["--data_source", "no such file"], "--data_source no such file"),
        (["--test_data", "nowhere"], "--test_data nowhere"),
        (["optim.learning_rate=1"], "optim.learning_rate"),
        (["run_dir=elsewhere"], "run_dir=elsewhere: the script has it from --work_dir"),
        (["objective=nll"], "--trainer_objective_trans"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = {"--dataset": "math", "--model_save_name": "qwen-2.5-math-7b"}
    given = {name: value for name, value in given.items() if name not in options}
    argv = [*options, *(word for pair in given.items() for word in pair)]
    assert main([*argv, "--work_dir", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("one_click: error: ")
    assert err.count("\n") == 1
    assert told in err
    assert list(tmp_path.rglob("*.*")) == []


def test_the_whole_road_on_a_tiny_model(tmp_path: Path) -> None:
    """FigFont, a tiny model and torchrun, in folders with spaces and quotes in their names."""
    pytest.importorskip("reasoning_gym", reason="pip install 'megatron-deft[figfont]'")
    from megatron_deft.data.tiny import make_tiny_llama

    model, root = tmp_path / "tiny 'model'", tmp_path / "a folder"
    make_tiny_llama(model, ["the cat"], vocab_size=280, hidden_size=32, layers=1, heads=2)
    tool = Path(__file__).parents[2] / "tools" / "one_click.py"
    commands = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(tool.parents[1]),
    }  # fmt: skip

    def run() -> str:
        done = subprocess.run(
            [sys.executable, str(tool), "--dataset", "figfont", "--model_save_name",
             "qwen-2.5-1.5b", "--trainer_objective_trans", "DEFT", "--nproc_per_node", "2",
             "--model_path", str(model), "--work_dir", str(root), "--smoke", "--run_script"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = run()
    assert "step 2/2" in first
    assert "is there" not in first
    (results,) = (root / "results/figfont").glob("*/results.json")
    assert len(json.loads(results.read_text())["models"]) == 2
    assert run().count("is there") == 5
    (export,) = (root / "hf/figfont").iterdir()
    export.rename(tmp_path / "moved")
    again = run()
    assert "nothing is left to train" in again
    assert again.count("is there") == 3
