"""Mathematics test sets as they are found, the released prompts, and scores of answers."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_deft.errors import UserError
from megatron_deft.evaluation import math
from megatron_deft.evaluation.limited import Limits
from megatron_deft.evaluation.math import TASK
from megatron_deft.evaluation.verify import verify

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
SOLUTION = r"First $\boxed{7}$ of them, then $1 + 1 = \boxed{2}$."

# Name of the set -> a row as it is found, and the question and gold that are read.
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "math_oai": (
        {"problem": "1 + 1?", "solution": SOLUTION, "answer": "2", "level": 1},
        "1 + 1?",
        "2",
    ),
    "MATH-500": ({"problem": "1 + 1?", "solution": SOLUTION, "answer": "not it"}, "1 + 1?", "2"),
    "minerva_math": ({"problem": "1 + 1?", "solution": SOLUTION, "idx": 0}, "1 + 1?", "2"),
    "math": ({"problem": "1 + 1?", "solution": SOLUTION, "type": "Algebra"}, "1 + 1?", "2"),
    "aime24": (
        {"problem": "one?", "question": "two?", "solution": SOLUTION, "answer": "073"},
        "two?",
        "073",
    ),
    "aime25": ({"problem": "one?", "solution": SOLUTION, "answer": 73}, "one?", "73"),
    "amc23": ({"problem": "one?", "question": "two?", "answer": 27.0}, "two?", "27"),
    "gsm8k": ({"question": "two?", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,002"}, "two?", "1,002"),
    "olympiadbench": (
        {"question": "two?", "final_answer": ["$x=1$", "2"], "solution": [SOLUTION], "unit": None},
        "two?",
        "x=1",
    ),
    "mine": ({"problem": "one?", "answer": r"\frac{1}{2}"}, "one?", r"\frac{1}{2}"),
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def record(gold: str, output: str) -> dict[str, Any]:
    return {"index": 0, "sample": 0, "set": "s", "gold": {"answer": gold}, "output": output}


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_sets(name: str, ending: str, tmp_path: Path) -> None:
    row, text, gold = ROWS[name]
    (question,) = TASK.read([write(tmp_path / f"{name}.{ending}", [row])])
    assert (question.set, question.text, question.gold) == (name, text, {"answer": gold})
    assert question.messages == ({"role": "user", "content": f"{text}\n{BOXED}"},)


def test_several_sets_in_their_order(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", [ROWS[name][0]] * 2) for name in ("gsm8k", "math")]
    assert [question.set for question in TASK.read(files)] == ["gsm8k", "gsm8k", "math", "math"]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("a", {"query": "?", "target": "2"}, "columns query, target: legal are question and final"),
        (
            "aime24",
            {"problem": "?", "solution": SOLUTION},
            "legal are question and answer; problem",
        ),
        ("a", {"problem": "?", "solution": "no box"}, "line 2: solution holds no gold.*boxed"),
        ("a", {"question": "?", "answer": "so\n####  "}, "line 2: answer holds no gold"),
        ("a", {"question": "?", "answer": None}, "line 2: answer holds no gold"),
        ("a", {"question": "?", "final_answer": []}, "line 2: final_answer holds no gold.*a list"),
        ("a", {"question": "?", "final_answer": "2"}, "line 2: final_answer holds no gold"),
        ("a", {"question": " ", "answer": "2"}, "line 2: question must be a text"),
        ("a", {"question": 5, "answer": "2"}, "line 2: question must be a text"),
    ],
)
def test_rows_that_cannot_be_used(
    name: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fine = {key: ["2"] if key == "final_answer" else SOLUTION for key in row}
    file = write(tmp_path / f"{name}.jsonl", [fine, row])
    with pytest.raises(UserError, match=rf"{name}\.jsonl.*{message}"):
        TASK.read([file])


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        TASK.read([str(tmp_path / "math.jsonl")])
    with pytest.raises(UserError, match="no rows"):
        TASK.read([write(tmp_path / "empty.jsonl", [])])
    with pytest.raises(UserError, match="2 files are named math"):
        TASK.read([str(tmp_path / "math.jsonl"), str(tmp_path / "math.json")])


def test_prompts_are_the_released_ones() -> None:
    assert list(TASK.prompts) == [
        "chat",
        "qwen-boxed",
        "llama-base-boxed",
        "llama-base-boxed-with-bos",
        "deepseek-math",
    ]
    assert TASK.prompts["chat"] is None
    assert TASK.prompts["qwen-boxed"] == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n{question}\n" + BOXED + "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert TASK.prompts["llama-base-boxed"] == (
        "<|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful assistant.<|end_of_text|>\n"
        "<|start_header_id|>user<|end_header_id|>\n\n{question}\n" + BOXED + "<|end_of_text|>\n"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert TASK.prompts["llama-base-boxed-with-bos"] == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "You are a helpful assistant.<|eot_id|>\n"
        "<|start_header_id|>user<|end_header_id|>\n\n{question}\n" + BOXED + "<|eot_id|>\n"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert TASK.prompts["deepseek-math"] == (
        "<｜begin▁of▁sentence｜>User: {question}\n" + BOXED + "\n\nAssistant:"  # noqa: RUF001
    )


def test_answers_are_drawn_as_released() -> None:
    drawn = TASK.sampling
    assert (drawn.max_new_tokens, drawn.temperature, drawn.top_p, drawn.seed) == (4096, 1, 1, 0)
    assert TASK.samples == 16


def test_scores_of_records_in_their_order() -> None:
    pytest.importorskip("math_verify", reason="pip install 'megatron-deft[math]'")
    records = [
        record("1,002", r"it is $\boxed{1002}$"),
        record("1,002", ""),
        record("4.5e33", r"\boxed{4.5 \times 10^{33} \text{ erg/s}}"),
        record("1,002", r"another way, and it is $\boxed{1002}$"),
        record("1,002", r"it is $\boxed{1003}$"),
    ]
    expected = [{"accuracy": value} for value in (1.0, 0.0, 1.0, 1.0, 0.0)]
    assert TASK.score(records, 1) == TASK.score(records, 2) == expected
    assert TASK.score([], 2) == []


def test_answers_that_cannot_be_compared_are_wrong_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("math_verify", reason="pip install 'megatron-deft[math]'")
    monkeypatch.setattr(math, "verify", partial(verify, limits=Limits(0.5)))
    hangs = [record("5", rf"{i} ways: \boxed{{9^{{9^{{9^9}}}}}}") for i in range(3)]
    with caplog.at_level(logging.WARNING):
        scores = TASK.score([record("5", r"\boxed{5}"), *hangs], 1)
    assert scores == [{"accuracy": value} for value in (1.0, 0.0, 0.0, 0.0)]
    assert [entry.getMessage() for entry in caplog.records] == [
        "math-verify could not compare 3 of 4 answers, which count as wrong: "
        "3 passed the limit of time"
    ]
