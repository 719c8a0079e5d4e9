"""`bench data`, part 1: `prepare chat` beside the tokenizer's own encode_batch, on all cores.

Both see the very same texts: encode_batch gets them whole and rendered, in memory, and its ids are
thrown away. `prepare` reads files, checks and renders conversations, tokenises, finds the boundary
of every turn, and writes the set. So encode_batch is what it could reach if the rest were free.

The budget is on the steady rate: the seconds of the whole command less those of the same command on
one row for each worker, which is what starting the processes and loading the tokenizer takes. Those
seconds are the same for ten rows and for ten million, so with large data the steady rate is the
rate; how much they weigh at the number of rows measured is told beside it (`ratio_command`).
encode_batch_fast, which leaves offsets out and which `prepare` uses itself, is shown too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from megatron_deft.benchmarks import corpus
from megatron_deft.benchmarks.budgets import Row
from megatron_deft.benchmarks.processes import megatron_deft, part
from megatron_deft.data.manifest import read_manifest
from megatron_deft.data.rows import read_rows
from megatron_deft.processes import available_cores

log = logging.getLogger(__name__)

WORDS = 370  # of a sample on average: with their template about 500 tokens
VOCABULARY = 32_000
_METHODS = ("encode_batch", "encode_batch_fast")
# README's tokenizer of FigFont, and its model
FIGFONT_SPLIT = r"\n+| {4,}|[A-Z](?![a-z ])"
FIGFONT_MODEL = ("--vocab-size", 768, "--hidden-size", 128, "--layers", 2, "--rows", 4000)
_FIGFONT_TIMES = 5  # its samples have a fifth of the others' tokens
_SMALL_MODEL = ("--hidden-size", 16, "--heads", 2, "--kv-heads", 2, "--layers", 1)


class Case(NamedTuple):
    """What is tokenised: a file, the column that is read, and the folder of the tokenizer.

    times: how often the file is given, where its rows are too few or too short to be timed.
    """

    name: str
    file: Path
    column: str
    tokenizer: Path
    times: int = 1

    @property
    def form(self) -> str:
        """Of `prepare chat --format`."""
        return "messages" if self.column == "messages" else "columns"


def make_cases(work: Path, rows: int) -> list[Case]:
    """Write the files and learn the tokenizers."""
    chat, pairs, figfont = work / "chat.jsonl", work / "columns.parquet", work / "figfont"
    corpus.write_chat(chat, rows, WORDS)
    corpus.write_columns(pairs, rows, WORDS)
    megatron_deft("prepare", "figfont", figfont, "--train-size", min(rows, 40_000))
    learn(work / "bpe", chat, "messages")
    drawn = figfont / "train.parquet"
    split = ("--split", FIGFONT_SPLIT)
    megatron_deft("tiny", work / "figfont-bpe", "--corpus", drawn, *split, *FIGFONT_MODEL)
    return [
        Case("chat, JSONL", chat, "messages", work / "bpe"),
        Case("columns, parquet", pairs, "extra_info", work / "bpe"),
        Case("FigFont, parquet", drawn, "messages", work / "figfont-bpe", _FIGFONT_TIMES),
    ]


def learn(out: Path, file: Path, column: str) -> None:
    """Learn a tokenizer of up to VOCABULARY tokens from the first rows of a file."""
    texts = ("--corpus", file, "--column", column, "--rows", 10_000)
    megatron_deft("tiny", out, *texts, "--vocab-size", VOCABULARY, *_SMALL_MODEL)


def measure(work: Path, cases: Sequence[Case], repetitions: int) -> list[Row]:
    """Every case, one after the other in each repetition."""
    prepared = {case.name: _Prepared(work / f"case-{n}", case) for n, case in enumerate(cases)}
    for _ in range(repetitions):
        for one in prepared.values():
            one.repeat()
    return [one.row() for one in prepared.values()]


class _Prepared:
    """A case with its texts, and what was measured so far."""

    def __init__(self, folder: Path, case: Case) -> None:
        folder.mkdir()
        self.case, self.folder, self.workers = case, folder, available_cores()
        self.texts = folder / "texts.jsonl"
        self.about = part(
            "render_texts", file=case.file, tokenizer=case.tokenizer, column=case.column,
            out=self.texts, times=case.times,
        )  # fmt: skip
        self.heads = []
        rows = read_rows([str(case.file)], [case.column])
        for number, (_, row) in zip(range(self.workers), rows, strict=False):
            self.heads.append(folder / f"{number}.jsonl")
            self.heads[-1].write_text(json.dumps({case.column: row[case.column]}) + "\n")
        self.times: list[dict[str, float]] = []
        self.tokens: set[int] = set()

    def repeat(self) -> None:
        start, out = self._prepare(self.heads), self.folder / "set"
        times = {"start": start, "command": self._prepare([self.case.file] * self.case.times)}
        self.tokens.add(read_manifest(out)["tokens"])
        for method in _METHODS:
            found = part(
                "encode_texts", texts=self.texts, tokenizer=self.case.tokenizer, method=method
            )
            times[method] = found["seconds"]
            self.tokens.add(found["tokens"])
        self.times.append(times)
        shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.items())
        log.info("%s, seconds: %s", self.case.name, shown)

    def _prepare(self, files: Sequence[Path]) -> float:
        case = self.case
        return megatron_deft(
            "prepare", "chat", self.folder / "set", *files, "--tokenizer", case.tokenizer,
            "--format", case.form, "--workers", self.workers, "--overwrite",
        )  # fmt: skip

    def row(self) -> Row:
        return summary(self.case.name, self.about, self.times, self.tokens) | {
            "workers": self.workers
        }


def summary(
    name: str, about: dict[str, Any], times: Sequence[dict[str, float]], tokens: set[int]
) -> Row:
    """The row of a case; ratios are medians of those of each repetition.

    times: seconds of each repetition; tokens: all counts that were seen, which have to be one.
    The steady rates and ratios are None with too few rows to tell them.
    """

    def of(top: str, less: float) -> float:
        return median(t[top] / (t["command"] - less * t["start"]) for t in times)

    seconds = {key: median(t[key] for t in times) for key in times[0]}
    count = max(tokens)
    # where most of the command is its start, nothing can be said of what comes after it
    is_long = all(t["command"] > 2 * t["start"] for t in times)
    steady = seconds["command"] - seconds["start"] if is_long else None
    return {
        "name": name,
        **about,
        "tokens": count,
        "tokens_per_row": count / about["rows"],
        "seconds": seconds,
        "rows_per_second": steady and about["rows"] / steady,
        "tokens_per_second": steady and count / steady,
        "rows_per_second_command": about["rows"] / seconds["command"],
        "tokens_per_second_command": count / seconds["command"],
        "tokens_per_second_encode_batch": count / seconds["encode_batch"],
        "ratio": of("encode_batch", 1) if is_long else None,
        "ratio_command": of("encode_batch", 0),
        "ratio_fast": of("encode_batch_fast", 1) if is_long else None,
        "repetitions": list(times),
        "wrong": int(len(tokens) != 1),
    }
