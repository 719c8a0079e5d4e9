"""`inspect data` shows what a person would look for."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_deft.cli import main
from megatron_deft.data.prepare.tokenise import RowSettings, prepare_set
from tests.data.files import chat, write

ROWS: list[Any] = [chat("a", "b"), chat("c", "d" * 90), chat("e", "f", weight=0.5), chat("g", "h")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """a.jsonl, and set/ of it: the second sample is too long, and a line is broken."""
    root = tmp_path_factory.mktemp("inspect")
    file = write(root / "a.jsonl", [*ROWS, "broken"])
    settings = RowSettings(max_length=60, truncation="drop", bad_rows="drop")
    prepare_set(root / "set", [file], tiny_folder, settings)
    documents = write(root / "b.jsonl", [{"text": "one"}, {"text": "two"}])
    prepare_set(root / "text", [documents], tiny_folder, RowSettings(format="text"))
    return root


def shown(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["inspect", "data", *words]) == code
    out, err = capsys.readouterr()
    return err if code == 2 else out


def test_a_set(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(made / "set"))
    for part in (
        "set: 3 samples (sft), ",
        "a.jsonl (format messages)",
        "max_length 60, truncation drop",
        f"1 left out, too long: {made / 'a.jsonl'} line 2",
        f"1 left out, not JSON: {made / 'a.jsonl'} line 5",
        "tokens per sample: p50 ",
        "  <= 32                  3  ####",
        "<|im_start|>assistant\n⟦b<|im_end|>⟧\n",
        "<|im_start|>assistant\n⟦f<|im_end|>⟧*0.5\n",
        "--- sample 2: ",
        " tokens, 2 trained",
    ):
        assert part in text


def test_which_samples(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def indices(*words: str) -> list[int]:
        found = json.loads(shown(capsys, str(made / "set"), "--json", *words))
        return [sample["index"] for sample in found["shown"]]

    assert indices() == [0, 1, 2]
    assert indices("--n", "1") == [0]
    assert indices("--n", "0") == []
    assert indices("--index", "2,0") == [2, 0]
    drawn = {tuple(indices("--n", "1", "--seed", str(seed))) for seed in range(20)}
    assert drawn == {(0,), (1,), (2,)}
    assert "samples 0 to 2, there is no 3" in shown(
        capsys, str(made / "set"), "--index", "3", code=2
    )
    assert "expected numbers" in shown(capsys, str(made / "set"), "--index", "x", code=2)


def test_json(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(shown(capsys, str(made / "set"), "--json"))
    assert found["manifest"]["samples"] == 3
    assert found["histogram"] == [{"up_to": 32, "samples": 3}]
    assert set(found["lengths"]) == {"p50", "p90", "p99", "max"}
    assert found["damaged"] == []


def test_checksums(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    folder = tmp_path / "set"
    shutil.copytree(made / "set", folder)
    shown(capsys, str(folder), "--checksums")
    whole = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").write_bytes(b"\x07" + whole[1:])
    assert "DAMAGED: weights.bin" in shown(capsys, str(folder), code=1)
    assert "DAMAGED: weights.bin" in shown(capsys, str(folder), "--checksums", code=1)


def test_documents(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(made / "text"))
    assert "2 samples (pretrain)" in text
    assert "⟦one<|im_end|>⟧" in text
    assert "template" not in text


def test_a_file(made: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(made / "a.jsonl")
    assert "add --tokenizer HF" in shown(capsys, file, code=2)
    common = (file, "--tokenizer", str(tiny_folder), "--n", "2")
    text = shown(capsys, *common)
    assert "⟦b<|im_end|>⟧" in text
    assert "--- sample 1: " in text
    assert "--- sample 2: " not in text
    text = shown(capsys, *common, "--max-length", "60", "--truncation", "drop")
    assert f"1 left out, too long: {file} line 2" in text
    assert "line 5: not JSON" in shown(capsys, *common[:-1], "9", code=2)
    documents = (str(made / "b.jsonl"), "--format", "text", "--tokenizer", str(tiny_folder))
    assert "⟦one<|im_end|>⟧" in shown(capsys, *documents)
    assert "⟦<|im_start|>" not in shown(capsys, *common, "--template", "chatml")


def test_what_is_neither(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such file or folder" in shown(capsys, str(tmp_path / "none"), code=2)
    assert "is no prepared set" in shown(capsys, str(tmp_path), code=2)


def test_a_set_may_be_asked_for_its_tokenizer(
    made: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (str(made / "set"), "--n", "0", "--tokenizer", str(tiny_folder))
    assert "3 samples" in shown(capsys, *words)
    assert "another chat template" in shown(capsys, *words, "--template", "qwen", code=2)


@pytest.mark.parametrize(
    ("of", "options"),
    [
        ("a.jsonl", ["--seed", "0"]),
        ("a.jsonl", ["--index", "1"]),
        ("a.jsonl", ["--checksums"]),
        ("set", ["--max-length", "8"]),
        ("set", ["--format", "messages"]),
        ("set", ["--template", "chatml"]),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    made: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], of: str, options: list[str]
) -> None:
    tokenizer = ["--tokenizer", str(tiny_folder)] if of == "a.jsonl" else []
    error = shown(capsys, str(made / of), *tokenizer, *options, code=2)
    assert f"{options[0]}: for " in error


def test_no_sample_of_a_file(
    made: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (str(made / "a.jsonl"), "--tokenizer", str(tiny_folder), "--n", "0")
    assert "--- sample" not in shown(capsys, *words)
