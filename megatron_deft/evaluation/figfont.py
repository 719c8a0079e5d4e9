"""FigFont: does a model read the word that ASCII art spells? Scores, and the comparison of models.

The released evaluation decodes greedily, 5 new tokens, and scores exact and case-folded matches
(Beyond-Log-Likelihood, evaluations/figfont/main.py); the DEFT paper adds Jaro-Winkler similarity.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from megatron_deft.data.chat import render_messages
from megatron_deft.data.prepare.figfont import LLAMA_PROMPT, QWEN_PROMPT, SYSTEM
from megatron_deft.data.rows import read_rows
from megatron_deft.errors import UserError
from megatron_deft.evaluation.engines import (
    Engine,
    Sampling,
    check_folder,
    engine_name,
    load_tokenizer,
    make_engine,
)
from megatron_deft.evaluation.results import (
    GenerationLog,
    Metric,
    bootstrap,
    format_table,
    machine,
    model_identity,
    summarise,
    versions,
    wilson,
)
from megatron_deft.files import atomic_write
from megatron_deft.platform import device

MAX_NEW_TOKENS = 5  # of the released evaluation
# "chat" goes through the tokenizer's chat template; the others are the released strings, verbatim.
PROMPT_TYPES = {"chat": None, "qwen_prompt": QWEN_PROMPT, "llama_prompt": LLAMA_PROMPT}
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


METRICS = {
    "exact": Metric("exact", exact, wilson),
    "normalised": Metric("normalised", normalised, wilson),
    "jaro_winkler": Metric("Jaro-Winkler", jaro_winkler, bootstrap),
}


@dataclass(frozen=True)
class Sample:
    """One question as a conversation that ends with its answer."""

    messages: tuple[Mapping[str, Any], ...]
    question: str
    answer: str


def evaluate(
    models: Sequence[str | Path],
    data: str | Path,
    out: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = MAX_NEW_TOKENS,
    engine: str = "auto",
    names: Sequence[str] | None = None,
    prompt_type: str = "chat",
    dtype: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Score Hugging Face folders on the samples of `data` (parquet or JSONL); print one table.

    Decoding is greedy. The first model is what the others are compared with. `limit` takes the
    first so many samples. `names` (the folders' names unless given) stand in the table. `out`
    is the file for the results, or a folder for results.json. Beside it each model's answers are
    written, as they come, to generations_NAME.jsonl; a rerun with the same model, data and settings
    continues that file.

    Returns what results.json holds: per model each metric's mean, 95% interval and delta to the
    first model, counts, settings, versions. Errors: UserError for a model folder, file, column or
    option that is missing or wrong, and a tokenizer without a chat template.
    """
    folders = [check_folder(model) for model in models]
    labels = _labels(folders, names)
    if prompt_type not in PROMPT_TYPES:
        raise UserError(f"prompt_type={prompt_type}: one of {', '.join(PROMPT_TYPES)} is needed")
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: at least 1 is needed")
    sampling = Sampling(max_new_tokens)
    settings = {
        "engine": engine_name(engine),
        "device": device().type,
        "dtype": dtype,
        "prompt_type": prompt_type,
        **asdict(sampling),
    }
    whole = read_samples(data)
    samples, digest = whole[:limit], _digest(whole)
    target = Path(out) if out is not None else None
    if target is not None and target.suffix != ".json":
        target /= "results.json"
    for folder in folders:  # a template that does not fit fails before any weight is loaded
        render_prompt(load_tokenizer(folder), samples[0], prompt_type)

    values: dict[str, dict[str, list[float]]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for label, folder in zip(labels, folders, strict=True):
        header = {"model": model_identity(folder), "data": digest, **settings}
        file = target.with_name(f"generations_{label}.jsonl") if target else None
        log = GenerationLog(file, header)
        if log.changed and progress:
            print(f"{file}: begun anew, since {', '.join(log.changed)} changed", file=sys.stderr)
        if any(index not in log.records for index in range(len(samples))):
            loaded = make_engine(engine, folder, batch_size, dtype)
            try:
                bar = {"desc": label, "disable": None if progress else True}
                _generate(loaded, samples, sampling, prompt_type, log, bar)
            finally:
                loaded.close()
        records = [log.records[index] for index in range(len(samples))]
        values[label] = _scores(records, samples)
        entries[label] = {
            "path": str(folder),
            "identity": header["model"],
            "samples": len(records),
            "unfinished": sum(not record["finished"] for record in records),
            "generated_tokens": sum(record["tokens"] for record in records),
        }

    summary = summarise(METRICS, values)
    results = {
        "task": "figfont",
        "data": {"path": str(data), "samples": len(samples), "blake2b": digest},
        "settings": settings,
        "models": {label: {**entries[label], "scores": summary[label]} for label in labels},
        "versions": versions(),
        "machine": machine(),
    }
    if target is not None:
        with atomic_write(target) as handle:
            json.dump(results, handle, indent=2)
            handle.write("\n")
    print(
        f"FigFont: {len(samples)} samples, greedy, {max_new_tokens} new tokens, percent [95%]\n"
        + format_table(METRICS, summary)
    )
    return results


def read_samples(data: str | Path) -> list[Sample]:
    """The samples of a file with the column `messages`, or the released `extra_info`.

    Errors: UserError when the file is missing or empty, or a row has no question or answer.
    """
    path = Path(data)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file: `megatron-deft prepare figfont` writes test.parquet"
        )
    column = _column(path)
    samples = [
        _sample(where, column, row[column]) for where, row in read_rows([str(path)], [column])
    ]
    if not samples:
        raise UserError(f"{path}: the file has no rows")
    return samples


def render_prompt(tokenizer: Any, sample: Sample, prompt_type: str) -> str:
    """The text before the answer, special tokens written out.

    As "chat" it is, by construction, what training puts before the first trained token.
    """
    template = PROMPT_TYPES[prompt_type]
    if template is not None:
        return template.format(question=sample.question)
    return render_messages(tokenizer, sample.messages).pieces[0]


def _generate(
    engine: Engine,
    samples: Sequence[Sample],
    sampling: Sampling,
    prompt_type: str,
    log: GenerationLog,
    bar: Mapping[str, Any],
) -> None:
    """Answer the samples that `log` lacks, the longest prompts first; each goes into `log`.

    So batches of about one length waste no padding, and one that memory cannot hold fails at once.
    """
    todo = [index for index in range(len(samples)) if index not in log.records]
    texts = [render_prompt(engine.tokenizer, samples[index], prompt_type) for index in todo]
    ids = dict(
        zip(todo, engine.tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True)
    )
    todo.sort(key=lambda index: -len(ids[index]))
    answers = engine.generate([ids[index] for index in todo], sampling, todo)
    counted = tqdm(answers, total=len(todo), unit=" samples", **bar)
    for index, generation in zip(todo, counted, strict=True):
        record = {"question": samples[index].question, "answer": samples[index].answer}
        answered = asdict(generation)
        log.add({"index": index, **record, "output": answered.pop("text"), **answered})


def _scores(
    records: Sequence[Mapping[str, Any]], samples: Sequence[Sample]
) -> dict[str, list[float]]:
    """Metric -> the score of each sample."""
    pairs = [(r["output"], sample.answer) for r, sample in zip(records, samples, strict=True)]
    return {key: [metric.score(*pair) for pair in pairs] for key, metric in METRICS.items()}


def _labels(folders: Sequence[Path], names: Sequence[str] | None) -> list[str]:
    """A name per model, each fit for a file name and none twice."""
    if not folders:
        raise UserError("no model to evaluate: name at least one Hugging Face folder")
    if names is None:
        names = [folder.resolve().name for folder in folders]
    if len(names) != len(folders):
        raise UserError(f"{len(names)} names for {len(folders)} models: give one each")
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"name {name!r}: letters, digits and . _ - are legal")
    if len(set(names)) < len(names):
        raise UserError(f"two models share a name ({', '.join(names)}): pass distinct --names")
    return list(names)


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


def _sample(where: str, column: str, value: Any) -> Sample:
    if column == "messages":
        messages = [dict(message) for message in value or []]
        if not messages or messages[-1].get("role") != "assistant":
            raise UserError(f"{where}: messages must end with the assistant's answer")
        for message in messages[:-1]:
            if message["role"] == "assistant":
                message["train"] = False  # worked examples are part of the prompt
        questions = [m["content"] for m in messages if m["role"] == "user"]
        return Sample(tuple(messages), questions[-1] if questions else "", messages[-1]["content"])
    question, answer = (value or {}).get("question"), (value or {}).get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UserError(f"{where}: extra_info must hold the texts question and answer")
    conversation = {"system": SYSTEM, "user": question, "assistant": answer}
    messages = [{"role": role, "content": text} for role, text in conversation.items()]
    return Sample(tuple(messages), question, answer)


def _digest(samples: Sequence[Sample]) -> str:
    """Of every conversation; the answers count."""
    state = blake2b(digest_size=16)
    for sample in samples:
        state.update(json.dumps(sample.messages).encode())
    return state.hexdigest()
