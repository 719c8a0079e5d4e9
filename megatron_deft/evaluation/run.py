"""Let models answer the questions of a task; each answer is written as it comes, then scored."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_deft.errors import UserError
from megatron_deft.evaluation.engines import (
    Engine,
    Sampling,
    engine_name,
    make_engine,
)
from megatron_deft.evaluation.folder import check_folder, load_tokenizer
from megatron_deft.evaluation.log import GenerationLog, Key, labels_of, log_path, model_identity
from megatron_deft.evaluation.prompts import check_prompt, render_prompt, template_of
from megatron_deft.evaluation.scoring import Answers, results_path, score_answers
from megatron_deft.evaluation.task import Question, Task
from megatron_deft.platform import device


@dataclass(frozen=True)
class Choices:
    """How to ask, where it is not the task's way. None: as the task says.

    samples: answers to each question; limit: the first so many questions of each set.
    """

    prompt_type: str | None = None
    samples: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    limit: int | None = None
    engine: str = "auto"
    batch_size: int = 16
    dtype: str = "auto"


def evaluate(
    task: Task,
    models: Sequence[str | Path],
    data: Sequence[str | Path],
    out: str | Path | None = None,
    choices: Choices | None = None,
    *,
    names: Sequence[str] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Let Hugging Face folders answer the questions of files, and score them.

    The first model is what the others are compared with; `names` (the folders' names unless given)
    stand in the results. `out` is the file for these, or a folder for results.json. Beside it each
    model's answers are written, as they come, to generations_NAME.jsonl; a rerun with the same
    model, data and settings continues that file, also with more samples or a higher limit.

    workers: processes that score (all cores unless given).

    Returns what results.json holds: per model the metrics over all sets and of each, with 95%
    intervals and deltas to the first model, counts, settings, versions. Errors: UserError for a
    model folder, file, column or option that is missing or wrong, and a tokenizer that does not fit
    the prompt.
    """
    choices = choices or Choices()
    folders = [check_folder(model) for model in models]
    labels = labels_of(folders, names)
    prompt_type, template = template_of(task, choices.prompt_type)
    sampling, samples = _sampling(task, choices)
    files = [str(file) for file in data]
    questions = task.read(files)
    wanted = _limited(questions, choices.limit)
    settings = {
        "engine": engine_name(choices.engine),
        "device": device().type,
        "dtype": choices.dtype,
        "prompt_type": prompt_type,
        **asdict(sampling),
    }
    target = results_path(out, task.name)
    task.score([], 1)  # a package that scoring lacks is told before anything is generated
    for folder in folders:  # a prompt that does not fit fails before any weight is loaded
        tokenizer = load_tokenizer(folder)
        check_prompt(tokenizer, template)
        render_prompt(tokenizer, questions[wanted[0]], template)
    digest = _digest(questions)
    found = {}
    for label, folder in zip(labels, folders, strict=True):
        header = {"task": task.name, "model": model_identity(folder), "data": digest, **settings}
        plan = {"path": str(folder), "data": files, "samples": samples, "questions": wanted}
        file = log_path(target.parent, label) if target else None
        log = GenerationLog(file, header, plan)
        if log.changed and progress:
            kept = f"; what it held is in {log.old}" if log.old else ""
            why = f"since {', '.join(log.changed)} changed{kept}"
            print(f"{file}: begun anew, {why}", file=sys.stderr)
        todo = [(i, s) for i in wanted for s in range(samples) if (i, s) not in log.records]
        if todo:
            loaded = make_engine(choices.engine, folder, choices.batch_size, choices.dtype)
            try:
                bar = {"desc": label, "disable": None if progress else True}
                _answer(loaded, questions, template, sampling, todo, log, bar)
            finally:
                loaded.close()
        rows = [[log.records[i, s] for s in range(samples)] for i in wanted]
        found[label] = Answers(str(folder), header, rows)
    return score_answers(task, found, files, workers, target)


def _answer(
    engine: Engine,
    questions: Sequence[Question],
    template: str | None,
    sampling: Sampling,
    todo: list[Key],
    log: GenerationLog,
    bar: Mapping[str, Any],
) -> None:
    """Answer what `log` lacks, the longest prompts first; each answer goes into `log`.

    So batches of about one length waste no padding, and one that memory cannot hold fails at once.
    """
    indices = sorted({index for index, _ in todo})
    texts = [render_prompt(engine.tokenizer, questions[index], template) for index in indices]
    read = engine.tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = dict(zip(indices, read, strict=True))
    todo = sorted(todo, key=lambda key: (-len(ids[key[0]]), key))
    streams = [index | sample << 32 for index, sample in todo]  # that of sample 0 is its index
    answers = engine.generate([ids[index] for index, _ in todo], sampling, streams)
    counted = tqdm(answers, total=len(todo), unit=" answers", **bar)
    for (index, sample), generation in zip(todo, counted, strict=True):
        question, answer = questions[index], asdict(generation)
        log.add({
            "index": index, "sample": sample, "set": question.set, "question": question.text,
            "gold": question.gold, "output": answer.pop("text"), **answer,
        })  # fmt: skip


def _sampling(task: Task, choices: Choices) -> tuple[Sampling, int]:
    """How to draw, and how often. Errors: UserError for what makes no sense."""
    given = {
        key: value
        for key in ("max_new_tokens", "temperature", "top_p", "seed")
        if (value := getattr(choices, key)) is not None
    }
    sampling = replace(task.sampling, **given)
    samples = task.samples if choices.samples is None else choices.samples
    if choices.samples is None and sampling.temperature == 0:
        samples = 1  # more would be the same
    if samples < 1:
        raise UserError(f"samples={samples}: at least 1 is needed")
    if samples > 1 and sampling.temperature == 0:
        raise UserError(
            f"samples={samples} at temperature 0: all would be the same: raise the temperature, or "
            "take 1 sample"
        )
    return sampling, samples


def _limited(questions: Sequence[Question], limit: int | None) -> list[int]:
    """The numbers of the questions, or of the first `limit` of each set."""
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: at least 1 is needed")
    seen: dict[str, int] = {}
    wanted = []
    for index, question in enumerate(questions):
        seen[question.set] = seen.get(question.set, 0) + 1
        if limit is None or seen[question.set] <= limit:
            wanted.append(index)
    return wanted


def _digest(questions: Sequence[Question]) -> str:
    """Of every question with its gold."""
    state = blake2b(digest_size=16)
    for question in questions:
        state.update(json.dumps(asdict(question), sort_keys=True).encode())
    return state.hexdigest()
