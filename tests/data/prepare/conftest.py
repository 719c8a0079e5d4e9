"""A handful of rows with the columns of the published data sets, as files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_deft.data import jsonl
from megatron_deft.data.prepare.splits import Choice
from tests.data.files import write
from tests.data.prepare.sets import ROWS, TASK

QUIET = Choice(progress=False)

NUMINA_ROWS: list[dict[str, Any]] = [
    {
        "source": source,
        "problem": problem,
        "solution": solution,
        "messages": [
            {"content": problem, "role": "user"},
            {"content": solution, "role": "assistant"},
        ],
    }
    for source, problem, solution in (
        ("synthetic_math", "Solve $2y = 13/3$.", "Halve it: $\\boxed{\\frac{13}{6}}$."),
        ("cn_k12", "Is $1 < 2$?", "Yes, $\\boxed{\\text{A}}$."),
        ("olympiads", "Prove that $x = x$.", "It is evident."),
        ("aops_forum", "¿Cuánto es 2+2? ∑", "Es $\\boxed 4$."),
    )
]
MATH_ROWS: list[dict[str, Any]] = [
    {
        "problem": "What is $1+1$?", "level": "Level 1", "solution": "It is $\\boxed{2}$.",
        "type": "Algebra",
    },
    {
        "problem": "What is $2+2$?", "level": "Level 5", "solution": "It is $\\boxed{4}$.",
        "type": "Number Theory",
    },
]  # fmt: skip
M23K_ROWS: list[dict[str, Any]] = [
    {
        "answer_idx": 1,
        "source": "MedMCQA",
        "metadata": "{}",
        "prompt": f"Which is {i}?\nA. one\nB. two",
        "answer_letter": letter,
        "answer_string": text,
        "reasoning": f"Let me think about {i}.",
        "distilled_answer_string": f"It is {text}.\n\n\\boxed{{{letter}}}",
        "text": "unused",
    }
    for i, (letter, text) in enumerate((("A", "one"), ("B", "two"), ("A", "one")))
]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def read(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{split}.parquet").to_pylist()
    return rows


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "TASK_BYTES", TASK)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write(tmp_path / "a.jsonl", ROWS)
