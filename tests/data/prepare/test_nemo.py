"""Data for NeMo: prompts as the model sees them, answers with their end of turn."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_deft.cli import main
from megatron_deft.data.indexed import open_set
from megatron_deft.data.prepare.nemo import write_nemo
from megatron_deft.data.prepare.settings import RowSettings
from megatron_deft.data.prepare.tokenise import prepare_set
from megatron_deft.errors import UserError
from tests.data.conftest import CHATML
from tests.data.files import chat, write
from tests.data.prepare.sets import hidden

COLUMNS = [{"extra_info": {"question": f"what is {n}?", "answer": f"it is {n}"}} for n in range(7)]
NO_ANSWER = {"extra_info": {"question": "why?", "answer": None}}


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_columns(tmp_path: Path, tiny_folder: Path, tokenizer: Any) -> None:
    train = write(tmp_path / "train.parquet", COLUMNS)
    val = write(tmp_path / "val.jsonl", COLUMNS[:2])
    out = tmp_path / "nemo"
    found = write_nemo(out, {"training": [train], "validation": [val, val]}, tiny_folder)
    assert found == {
        "training": {"rows": 7, "dropped": 0}, "validation": {"rows": 4, "dropped": 0}
    }  # fmt: skip
    written = lines(out / "training.jsonl")
    assert [line["output"] for line in written] == [f"it is {n}<|im_end|>" for n in range(7)]
    assert [line["input"] for line in written] == [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"what is {n}?"}], tokenize=False,
            add_generation_prompt=True,
        )
        for n in range(7)
    ]  # fmt: skip
    assert lines(out / "validation.jsonl") == written[:2] * 2
    assert sorted(path.name for path in out.iterdir()) == ["training.jsonl", "validation.jsonl"]


def test_the_tokens_are_those_of_a_prepared_set(
    tmp_path: Path, tiny_folder: Path, tokenizer: Any
) -> None:
    """Input and output are tokenised apart: that is what NeMo does."""
    rows = [chat(f"say {n}", f"it is {n}, of course") for n in range(9)]
    file = write(tmp_path / "a.jsonl", rows)
    write_nemo(tmp_path / "nemo", {"training": [file], "validation": [file]}, tiny_folder)
    prepare_set(tmp_path / "set", [file], tiny_folder)
    data = open_set(tmp_path / "set", tokenizer)
    for index, line in enumerate(lines(tmp_path / "nemo" / "training.jsonl")):
        prompt, answer = (
            tokenizer(line[key], add_special_tokens=False)["input_ids"] for key in line
        )
        sample = data[index]
        end = int(sample.weights.nonzero()[0][-1]) + 1  # white space after the turn is left out
        assert [*prompt, *answer] == sample.tokens[:end].tolist()
        assert int(sample.weights.sum()) == len(answer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [*chat("a", "b")["messages"], *chat("c", "d")["messages"]]},
            r"a.jsonl line 2: the conversation has several trained turns",
        ),
        (chat("a", "b", weight=0.5), r"a.jsonl line 2: the turn has weight 0.5"),
        (chat("a", None), r"a.jsonl line 2: messages\[1\].content"),
        (chat("a", " b"), r"a.jsonl line 2: the answer begins or ends with a space"),
    ],
)
def test_a_row_without_a_place_in_nemo(
    row: Any, message: str, tmp_path: Path, tiny_folder: Path
) -> None:
    good = write(tmp_path / "b.jsonl", [chat("a", "b")])
    file = write(tmp_path / "a.jsonl", [chat("a", "b"), row, chat("c", "d")])
    files = {"training": [good], "validation": [file]}
    with pytest.raises(UserError, match=message):
        write_nemo(tmp_path / "nemo", files, tiny_folder)
    assert not (tmp_path / "nemo").exists()
    assert hidden(tmp_path) == []
    found = write_nemo(tmp_path / "nemo", files, tiny_folder, RowSettings(bad_rows="drop"))
    assert found["validation"] == {"rows": 2, "dropped": 1}


def test_turns_before_the_trained_one(tmp_path: Path, tiny_folder: Path) -> None:
    messages = [*chat("a", "b", train=False)["messages"], *chat("c", "d")["messages"]]
    file = write(tmp_path / "a.jsonl", [{"messages": messages}])
    write_nemo(tmp_path / "nemo", {"training": [file], "validation": [file]}, tiny_folder)
    (line,) = lines(tmp_path / "nemo" / "training.jsonl")
    assert (line["output"], line["input"].count("<|im_start|>")) == ("d<|im_end|>", 4)


def test_a_template_whose_turns_do_not_end_with_eos(tmp_path: Path, tiny_folder: Path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text(CHATML.replace("<|im_end|>", "<|endoftext|>"))
    file = write(tmp_path / "a.jsonl", [chat("a", "b ")])  # a space that is inside
    write_nemo(
        tmp_path / "nemo", {"training": [file], "validation": [file]}, tiny_folder,
        RowSettings(template=str(template)),
    )  # fmt: skip
    (line,) = lines(tmp_path / "nemo" / "training.jsonl")
    assert line["output"] == "b <|endoftext|>"


def test_a_written_prompt_that_ends_with_a_space(tmp_path: Path, tiny_folder: Path) -> None:
    row = {"extra_info": {"question": "Answer: ", "answer": "b"}}
    file = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=r"line 1: the prompt begins or ends with a space"):
        write_nemo(
            tmp_path / "nemo", {"training": [file], "validation": [file]}, tiny_folder,
            RowSettings(use_original_prompt=True),
        )  # fmt: skip


def test_no_row_is_left(tmp_path: Path, tiny_folder: Path) -> None:
    file, bad = write(tmp_path / "a.jsonl", COLUMNS), write(tmp_path / "b.jsonl", [NO_ANSWER])
    files = {"training": [file], "validation": [bad]}
    settings = RowSettings(format="columns", bad_rows="drop")
    with pytest.raises(UserError, match=r"b.jsonl: no row is left for validation"):
        write_nemo(tmp_path / "nemo", files, tiny_folder, settings)
    assert not (tmp_path / "nemo").exists()


def test_command(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.parquet", COLUMNS)
    words = ["prepare", "nemo", str(tmp_path / "nemo"), "--training", file, "--validation", file]
    words += ["--tokenizer", str(tiny_folder), "--limit", "3"]
    assert main(words) == 0
    assert capsys.readouterr().out == "".join(
        f"{tmp_path}/nemo/{split}.jsonl: 3 rows\n" for split in ("training", "validation")
    )
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").touch()
    assert main([*words[:2], str(other), *words[3:], "--overwrite"]) == 2
    assert (other / "mine").exists()


def test_a_file_that_is_not_there(tmp_path: Path, tiny_folder: Path) -> None:
    file = write(tmp_path / "a.jsonl", COLUMNS)
    files = {"training": [file], "validation": [str(tmp_path / "absent.parquet")]}
    with pytest.raises(UserError, match=r"absent\.parquet"):
        write_nemo(tmp_path / "nemo", files, tiny_folder)
    assert not (tmp_path / "nemo").exists()
