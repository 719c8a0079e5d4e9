"""`prepare math|medical --tokenizer`: on to sets that training reads."""

from pathlib import Path
from typing import Any

import pytest
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
    make_tiny_llama(folder / "hf", texts, vocab_size=400)
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
