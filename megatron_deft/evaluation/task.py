"""What a task is: questions, ways to ask them, how answers are drawn, and how they are scored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_deft.evaluation.engines import Sampling
from megatron_deft.evaluation.results import Metric

Record = Mapping[
    str, Any
]  # an answer: index, sample, set, question, gold, output, tokens, finished


@dataclass(frozen=True)
class Question:
    """One question of a test set.

    set: the test set, or the source within it, whose mean is told apart. text: what a written-out
    prompt asks. messages: the conversation up to the answer, for the chat template. gold: JSON,
    all that scoring an answer needs; it is kept beside every answer.
    """

    set: str
    text: str
    messages: tuple[Mapping[str, Any], ...]
    gold: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A kind of test.

    read: from files to questions; UserError for one that cannot be used. prompts: prompt type -> its
    text with {question}, None for the tokenizer's chat template; the first is the default. score:
    from answers and a number of processes to the value of every metric, 0 to 1, of each answer.
    sampling, samples: the released way to answer, and how often each question is.
    """

    name: str
    title: str
    read: Callable[[Sequence[str]], list[Question]]
    prompts: Mapping[str, str | None]
    metrics: Mapping[str, Metric]
    score: Callable[[Sequence[Record], int], list[dict[str, float]]]
    sampling: Sampling
    samples: int = 1
