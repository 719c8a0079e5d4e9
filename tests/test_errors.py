"""Every failure a user can cause: one line that says what, where and the mend; exit code 2."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from megatron_deft.cli import main
from tests.distributed import run_ranks


def call(rank: int, world: int, arguments: list[str]) -> tuple[int, str]:
    os.environ["WORLD_SIZE"] = str(world)
    with redirect_stderr(StringIO()) as said, redirect_stdout(StringIO()):
        code = main(arguments)
    return code, said.getvalue()


def without_template(folder: Path, to: Path) -> Path:
    """A copy of the weights whose tokenizer has no chat template."""
    shutil.copytree(folder, to)
    path = to / "hf" / "tokenizer_config.json"
    content = json.loads(path.read_text())
    del content["chat_template"]
    path.write_text(json.dumps(content))
    return to


def without_tokenizer(folder: Path, to: Path) -> Path:
    """A copy of the weights that came without a tokenizer."""
    shutil.copytree(folder, to)
    for path in (to / "hf").glob("*token*"):
        path.unlink()
    return to


def empty(folder: Path) -> Path:
    (folder / "empty.jsonl").touch()
    return folder / "empty.jsonl"


def bigger_vocabulary(folder: Path, to: Path) -> Path:
    """A copy of the weights whose tokenizer knows ten tokens more than the model."""
    shutil.copytree(folder, to)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(to / "hf")
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(10)])
    tokenizer.save_pretrained(to / "hf")
    return to


Case = Callable[[Path, Path], list[str]]  # (base, scratch folder) -> overrides

CASES: dict[str, tuple[str, Case]] = {
    "missing data": ("nowhere.jsonl", lambda b, t: ["data.train_files=[nowhere.jsonl]"]),
    "empty data": (
        "empty.jsonl",
        lambda b, t: [f"data.train_files=[{empty(t)}]"],
    ),
    "bad column": ("no column", lambda b, t: ["data.prompt_key=quest", "data.format=columns"]),
    "bad key in a column": ("data.prompt_dict_keys", lambda b, t: ["data.prompt_dict_keys=[q]"]),
    "all truncated": ("no trained token", lambda b, t: ["data.max_length=4"]),
    "wrong objective": ("legal are", lambda b, t: ["objective=cross"]),
    "not enough ranks": ("start a multiple of 2", lambda b, t: ["parallel.tensor=2"]),
    "heads by tensor": ("start a multiple of 3", lambda b, t: ["parallel.tensor=3"]),
    "batch not divisible": ("multiple of", lambda b, t: ["train.micro_batch=3"]),
    "unknown key": ("Did you mean optim.lr", lambda b, t: ["optim.lrr=1"]),
    "wrong type": ("train.steps", lambda b, t: ["train.steps=many"]),
    "no model": ("does not exist", lambda b, t: ["model.load=nowhere"]),
    "a Hugging Face folder": ("convert import", lambda b, t: [f"model.load={b}/hf"]),
    "no chat template": (
        "no chat template",
        lambda b, t: [f"model.load={without_template(b / 'megatron', t / 'plain')}"],
    ),
    "no tokenizer": (
        "no tokenizer that transformers can read",
        lambda b, t: [f"model.load={without_tokenizer(b / 'megatron', t / 'bare')}"],
    ),
    "vocabulary": (
        "the tokenizer has 311 tokens and the model 301",
        lambda b, t: [f"model.load={bigger_vocabulary(b / 'megatron', t / 'bigger')}"],
    ),
    "nothing to resume": ("holds no whole checkpoint", lambda b, t: ["--resume"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_and_exit_code_2(base: Path, tmp_path: Path, name: str) -> None:
    named, case = CASES[name]
    config = tmp_path / "run.yaml"
    config.write_text(
        f"run_dir: {tmp_path}/run\n"
        f"model: {{load: {base}/megatron, dtype: fp32}}\n"
        f"data: {{train_files: [{base}/train.jsonl], max_length: 64}}\n"
        "train: {global_batch: 8, steps: 2}\n"
    )
    arguments = ["train", str(config), *case(base, tmp_path)]
    code, said = run_ranks(1, call, arguments)[0]
    assert code == 2
    lines = said.strip().splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("megatron-deft: error: ")
    assert named in lines[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


OTHER = {
    "report of what is not there": ("nowhere does not exist", ["report", "nowhere"]),
    "import what is not there": ("nowhere", ["convert", "import", "nowhere", "out"]),
    "export what is not there": ("nowhere", ["convert", "export", "nowhere", "out"]),
    "evaluate what is not there": ("nowhere", ["evaluate", "figfont", "nowhere", "--data", "x"]),
    "a font that is not there": (
        "not one of FigFont's", ["prepare", "figfont", "out", "--fonts", "comic"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_other_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    named, arguments = OTHER[name]
    monkeypatch.chdir(tmp_path)
    with redirect_stderr(StringIO()) as said:
        assert main(arguments) == 2
    assert len(said.getvalue().strip().splitlines()) == 1
    assert named in said.getvalue()
    assert not list(tmp_path.iterdir())
