"""FigFont: does a model read the word that ASCII art spells?

The released evaluation decodes greedily, 5 new tokens, and scores exact and case-folded matches
(Beyond-Log-Likelihood, evaluations/figfont/main.py); the DEFT paper adds Jaro-Winkler similarity.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_deft.data.prepare.figfont import LLAMA_PROMPT, QWEN_PROMPT, SYSTEM
from megatron_deft.data.rows import read_rows
from megatron_deft.errors import UserError
from megatron_deft.evaluation.engines import Sampling
from megatron_deft.evaluation.results import Metric
from megatron_deft.evaluation.task import Question, Record, Task

_COLUMNS = ("messages", "extra_info")  # ours and the released one; the first there is taken


def exact(prediction: str, answer: str) -> float:
    """1 when equal to the last character, else 0."""
    return float(prediction == answer)


def normalised(prediction: str, answer: str) -> float:
    """1 when equal without case and outer white space (the released script folds case alone)."""
    return float(prediction.strip().lower() == answer.strip().lower())


def jaro_winkler(prediction: str, answer: str) -> float:
    """Similarity from 0 to 1 of the two lower-cased, stripped strings, as the paper computes it.

    Other libraries differ: here half the differing matched pairs are not rounded down, and the
    prefix boost is given at any similarity. Equal strings score 1; an empty one, or none in common
    within the window, scores 0.
    """
    ours, theirs = prediction.strip().lower(), answer.strip().lower()
    if ours == theirs:
        return 1.0
    window = max(max(len(ours), len(theirs)) // 2 - 1, 0)
    taken = [False] * len(theirs)
    matched = ""  # of ours, in our order
    for index, character in enumerate(ours):
        for other in range(max(0, index - window), min(len(theirs), index + window + 1)):
            if not taken[other] and theirs[other] == character:
                taken[other] = True
                matched += character
                break
    if not matched:
        return 0.0
    in_their_order = [character for index, character in enumerate(theirs) if taken[index]]
    transpositions = sum(a != b for a, b in zip(matched, in_their_order, strict=True)) / 2
    count = len(matched)
    jaro = (count / len(ours) + count / len(theirs) + (count - transpositions) / count) / 3
    prefix = 0
    while prefix < min(4, len(ours), len(theirs)) and ours[prefix] == theirs[prefix]:
        prefix += 1
    return jaro + 0.1 * prefix * (1 - jaro)


def score(records: Sequence[Record], workers: int) -> list[dict[str, float]]:
    """The three scores of each answer; they take no time, so `workers` are not needed."""
    del workers
    pairs = [(record["output"], record["gold"]["answer"]) for record in records]
    scores = {"exact": exact, "normalised": normalised, "jaro_winkler": jaro_winkler}
    return [{key: function(*pair) for key, function in scores.items()} for pair in pairs]


def read_questions(files: Sequence[str]) -> list[Question]:
    """Those of files with the column `messages`, or the released `extra_info`.

    Errors: UserError when a file is missing or empty, or a row has no question or answer.
    """
    questions: list[Question] = []
    for file in files:
        path = Path(file)
        if not path.is_file():
            raise UserError(
                f"{path}: no such file: `megatron-deft prepare figfont` writes test.parquet"
            )
        column = _column(path)
        found = [
            _question(where, column, row[column]) for where, row in read_rows([file], [column])
        ]
        if not found:
            raise UserError(f"{path}: the file has no rows")
        questions += found
    return questions


def _column(path: Path) -> str:
    """Which of the columns `path` has."""
    try:
        if path.suffix == ".parquet":
            names = list(pq.read_schema(path).names)
        else:
            names = list(next(read_rows([str(path)], []), ("", {}))[1])
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a whole parquet file: make it again") from error
    for column in _COLUMNS:
        if column in names:
            return column
    raise UserError(
        f"{path}: no column {' or '.join(_COLUMNS)}, it has {', '.join(names) or 'no rows'}: "
        "take the test.parquet of `megatron-deft prepare figfont`"
    )


def _question(where: str, column: str, value: Any) -> Question:
    if column == "messages":
        messages = value if isinstance(value, list) else []
        if not all(isinstance(m, dict) and _has_texts(m, "role", "content") for m in messages):
            raise UserError(f"{where}: messages must be objects of the texts role and content")
        if not messages or messages[-1]["role"] != "assistant":
            raise UserError(f"{where}: messages must end with the assistant's answer")
        asked = [message["content"] for message in messages if message["role"] == "user"]
        answer = messages[-1]["content"]
        return _asked(messages[:-1], asked[-1] if asked else "", answer)
    value = value if isinstance(value, dict) else {}
    question, answer = value.get("question"), value.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UserError(f"{where}: extra_info must hold the texts question and answer")
    turns = {"system": SYSTEM, "user": question}
    messages = [{"role": role, "content": text} for role, text in turns.items()]
    return _asked(messages, question, answer)


def _has_texts(value: Mapping[str, Any], *keys: str) -> bool:
    return all(isinstance(value.get(key), str) for key in keys)


def _asked(messages: Sequence[Mapping[str, Any]], text: str, answer: str) -> Question:
    return Question("figfont", text, tuple(messages), {"answer": answer})


TASK = Task(
    name="figfont",
    title="FigFont",
    read=read_questions,
    # "chat" is the tokenizer's template; the others are the released strings, verbatim
    prompts={
        "chat": None,
        "qwen_prompt": QWEN_PROMPT,
        "llama_prompt": LLAMA_PROMPT,
    },
    metrics={
        "exact": Metric("exact", True),
        "normalised": Metric("normalised", True),
        "jaro_winkler": Metric("Jaro-Winkler", False),
    },
    score=score,
    sampling=Sampling(max_new_tokens=5),
)
