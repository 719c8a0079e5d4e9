"""`prepare math|medical --tokenizer`: on to sets that training reads."""

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from megatron_deft.cli import main
from megatron_deft.data.prepare.released import MATH, MEDICAL
from megatron_deft.data.tiny import make_tiny_llama
from tests.data.prepare.conftest import M23K_ROWS, NUMINA_ROWS, write_jsonl


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenising")
    texts = [
        write_jsonl(folder / "math.jsonl", NUMINA_ROWS).read_text(),
        write_jsonl(folder / "medical.jsonl", M23K_ROWS).read_text(),
    ]
    make_tiny_llama(folder / "plain", texts, vocab_size=400)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "plain")
    prompts = [MATH["deepseek-math"][1](""), MEDICAL["llama"][0]("")]
    tokenizer.add_tokens(
        [AddedToken(mark, special=True) for mark in re.findall("<[^>]+>", "".join(prompts))]
    )
    tokenizer.save_pretrained(folder / "hf")
    return folder


def samples(root: Path, out: Path, data: str, *more: str) -> list[tuple[str, str]]:
    """Prompt and response of each sample of OUT/train; OUT/val has the same rows."""
    from megatron_deft.data.indexed import open_set

    command = ["prepare", data, str(out), "--source", str(root / f"{data}.jsonl")]
    assert main([*command, "--tokenizer", str(root / "hf"), *more]) == 0
    tokenizer: Any = AutoTokenizer.from_pretrained(root / "hf")
    train, val = (open_set(out / split) for split in ("train", "val"))
    assert len(train) == len(val)
    return [
        (
            tokenizer.decode(sample.tokens[sample.weights == 0].tolist()),
            tokenizer.decode(sample.tokens[sample.weights > 0].tolist()),
        )
        for sample in (train[i] for i in range(len(train)))
    ]


def test_math(root: Path, tmp_path: Path) -> None:
    row = NUMINA_ROWS[0]
    (prompt, response), *rest = samples(root, tmp_path / "chat", "math")
    assert prompt == f"<|im_start|>user\n{row['problem']}<|im_end|>\n<|im_start|>assistant\n"
    assert response == row["solution"] + "<|im_end|>"
    assert len(rest) == len(NUMINA_ROWS) - 1
    written = samples(root, tmp_path / "out", "math", "--prompt-type", "deepseek-math")
    assert written[0] == (MATH["deepseek-math"][1](row["problem"]), response)


@pytest.mark.parametrize("thinking", [False, True])
def test_medical(root: Path, tmp_path: Path, thinking: bool) -> None:
    row = M23K_ROWS[1]
    answer = row["distilled_answer_string"]
    prompt, response = MEDICAL["llama"]
    more = ["--prompt-type", "llama", *["--thinking"] * thinking]
    made = samples(root, tmp_path / "out", "medical", *more)
    assert made[1] == (
        prompt(row["prompt"]),
        (response(row["reasoning"], answer) if thinking else answer) + "<|im_end|>",
    )


def test_longer_samples_are_cut(root: Path, tmp_path: Path) -> None:
    from megatron_deft.data.indexed import open_set

    whole = samples(root, tmp_path / "whole", "medical")
    shortest = int(open_set(tmp_path / "whole" / "train").lengths.min())
    made = samples(root, tmp_path / "out", "medical", "--max-length", str(shortest - 2))
    for (prompt, response), (same, longer) in zip(made, whole, strict=True):
        assert prompt == same
        assert longer.startswith(response)
        assert len(response) < len(longer)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("math", ["--max-length", "0"], "max_length=0"),
        ("math", ["--template", "nonsense"], "chat template nonsense"),
        ("medical", ["--workers", "0"], "--workers 0"),
        ("math", ["--tokenizer", "PLAIN", "--prompt-type", "deepseek-math"], "no single token of"),
        ("medical", ["--tokenizer", "PLAIN", "--prompt-type", "llama"], "no single token of"),
        ("medical", ["--tokenizer", "."], "no tokenizer that transformers can read"),
    ],
)
def test_what_cannot_be_tokenised_is_told_before_anything_is_written(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: str,
    options: list[str],
    message: str,
) -> None:
    command = ["prepare", data, str(tmp_path / "out"), "--source", str(root / f"{data}.jsonl")]
    options = [str(root / "plain") if option == "PLAIN" else option for option in options]
    assert main([*command, "--tokenizer", str(root / "hf"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_same_command_goes_on_with_what_was_not_tokenised(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    out = tmp_path / "out"
    written = ["prepare", "math", str(out), "--source", str(root / "math.jsonl")]
    command = [*written, "--tokenizer", str(root / "hf")]
    assert main(command) == 0
    assert main(command) == 2, "all is there"
    assert f"{out} exists already" in capsys.readouterr().err
    kept = {path: path.stat().st_mtime_ns for path in (out / "train.parquet", out / "train")}
    shutil.rmtree(out / "val")
    assert main([*command, "--limit", "1"]) == 2, "of other rows"
    assert main([*command, "--boxed-only"]) == 2, "of other rows"
    assert main(written) == 2, "nothing is left to do"
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (out / "val" / "manifest.json").is_file()
