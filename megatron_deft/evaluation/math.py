r"""Mathematics: test sets with a gold answer, the released prompts, accuracy by math-verify.

The released evaluation draws 16 answers a question at temperature 1, of 4096 new tokens at most,
and takes the mean over answers, then over questions.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_deft.data.prepare.released import BOXED, MATH
from megatron_deft.data.rows import columns_of_file, read_rows
from megatron_deft.errors import UserError
from megatron_deft.evaluation.answers import (
    boxed_gold,
    first_gold,
    hashed_gold,
    plain_gold,
    readings,
    tidy,
)
from megatron_deft.evaluation.engines import Sampling
from megatron_deft.evaluation.limited import Stopped
from megatron_deft.evaluation.results import Metric
from megatron_deft.evaluation.task import Question, Record, Task
from megatron_deft.evaluation.verify import verify

logger = logging.getLogger(__name__)

_STOPPED = {
    Stopped(late=True): "passed the limit of time",
    Stopped(late=False): "ran out of memory or crashed",
}


class _Layout(NamedTuple):
    """Columns of a test set; `take` makes the gold of its column's value."""

    question: str
    gold: str
    take: Callable[[Any], str | None]
    legal: str


_OLYMPIAD = _Layout("question", "final_answer", first_gold, "a list whose first item is the answer")
_ASKED = _Layout("question", "answer", hashed_gold, "the answer, or a solution with it after ####")
_SOLVED = _Layout("problem", "solution", boxed_gold, r"a solution with the answer in a \boxed{...}")
_PROBLEM = _Layout("problem", "answer", plain_gold, "the answer")
# The first whose columns a file has. Sets of many columns (MATH-500 has an answer too) are read as
# the released evaluation reads them.
_LAYOUTS = (_OLYMPIAD, _ASKED, _SOLVED, _PROBLEM)
# Sets whose solutions end in no box, or in one that is not the answer.
_BY_NAME = dict.fromkeys(("aime24", "aime25", "amc23"), (_ASKED, _PROBLEM))


def read(files: Sequence[str]) -> list[Question]:
    """The questions of JSONL, JSON or parquet files; each file is a set, named by its stem.

    The gold is {"answer": LaTeX or a number as text}.

    Errors: UserError for a file that is missing, empty or has other columns, two files of one name,
    and a row without a question or a gold.
    """
    names = Counter(Path(file).stem for file in files)
    for name, count in names.items():
        if count > 1:
            raise UserError(f"{count} files are named {name}, and each is a set: rename them")
    return [question for file in files for question in _read_set(file)]


def _read_set(file: str) -> list[Question]:
    name = Path(file).stem
    layout = _layout(file, _BY_NAME.get(name, _LAYOUTS))
    return [
        _question(name, where, row, layout)
        for where, row in read_rows([file], [layout.question, layout.gold])
    ]


def _layout(file: str, layouts: Sequence[_Layout]) -> _Layout:
    there = columns_of_file(file)
    for layout in layouts:
        if layout.question in there and layout.gold in there:
            return layout
    legal = "; ".join(f"{layout.question} and {layout.gold}" for layout in layouts)
    raise UserError(f"{file}: it has the columns {', '.join(there)}: legal are {legal}")


def _question(name: str, where: str, row: Mapping[str, Any], layout: _Layout) -> Question:
    text, gold = row[layout.question], layout.take(row[layout.gold])
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {layout.question} must be a text")
    if gold is None:
        raise UserError(f"{where}: {layout.gold} holds no gold: it must be {layout.legal}")
    turn = {"role": "user", "content": f"{text}\n{BOXED}"}
    return Question(name, text, (turn,), {"answer": gold})


def score(records: Sequence[Record], workers: int) -> list[dict[str, float]]:
    """1 or 0 for each answer: whether math-verify finds it equal to the gold.

    What cannot be compared within the limits of time and memory is wrong, and told in a warning.

    Errors: UserError when math-verify or its parser is not the one that is needed.
    """
    answers = [(tidy(record["gold"]["answer"]), readings(record["output"])) for record in records]
    different = list(dict.fromkeys(answers))
    verdicts = dict(zip(different, verify(different, workers), strict=True))
    found = [verdicts[answer] for answer in answers]
    stopped = Counter(verdict for verdict in found if isinstance(verdict, Stopped))
    if stopped:
        counts = ", ".join(f"{count} {_STOPPED[verdict]}" for verdict, count in stopped.items())
        logger.warning(
            f"math-verify could not compare {stopped.total()} of {len(answers)} answers, which "
            f"count as wrong: {counts}"
        )
    return [{"accuracy": float(verdict is True)} for verdict in found]


TASK = Task(
    name="math",
    title="Mathematics",
    read=read,
    prompts={"chat": None, **{name: write("{question}") for name, (_, write) in MATH.items()}},
    metrics={"accuracy": Metric("accuracy", True)},
    score=score,
    sampling=Sampling(max_new_tokens=4096, temperature=1.0, top_p=1.0, seed=0),
    samples=16,
)
