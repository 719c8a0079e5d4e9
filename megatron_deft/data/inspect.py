"""What a prepared set holds, for a person: counts, lengths, what was left out, samples marked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_deft.data.indexed import damaged_files, open_set
from megatron_deft.data.manifest import TOKENIZER
from megatron_deft.data.prepare.samples import Counts, Tokeniser
from megatron_deft.data.prepare.settings import RowSettings, columns_of
from megatron_deft.data.rows import cut, detect_format, place
from megatron_deft.data.samples import Encoded
from megatron_deft.data.task import Task
from megatron_deft.data.tokenizer import load_tokenizer
from megatron_deft.errors import UserError

_PERCENTILES = (50, 90, 99)
_BAR = 40  # characters of the longest bar
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


@dataclass(frozen=True)
class Shown:
    """One sample. text: trained tokens between ⟦ and ⟧, *weight behind unless it is 1."""

    index: int
    tokens: int
    trained: int
    text: str


@dataclass(frozen=True)
class Found:
    """What is shown of a set or a file. damaged: files whose checksum is not the manifest's."""

    head: list[str]
    manifest: Mapping[str, Any]
    lengths: dict[str, int]
    histogram: list[tuple[int, int]]
    shown: list[Shown]
    damaged: list[str]

    def to_json(self) -> dict[str, Any]:
        """Everything as one JSON object."""
        return {
            "manifest": dict(self.manifest),
            "lengths": self.lengths,
            "histogram": [{"up_to": up_to, "samples": n} for up_to, n in self.histogram],
            "shown": [asdict(sample) for sample in self.shown],
            "damaged": self.damaged,
        }

    def text(self) -> str:
        """Everything as lines."""
        lines = [*self.head, ""]
        lines.append("tokens per sample: " + ", ".join(f"{k} {v}" for k, v in self.lengths.items()))
        most = max((count for _, count in self.histogram), default=1)
        for up_to, count in self.histogram:
            bar = "#" * math.ceil(_BAR * count / most)
            lines.append(f"  <= {up_to:<9} {count:>11}  {bar}")
        for sample in self.shown:
            share = f"{sample.tokens} tokens, {sample.trained} trained"
            lines += ["", f"--- sample {sample.index}: {share}", sample.text]
        lines += [f"DAMAGED: {name}" for name in self.damaged]
        return "\n".join(lines)


def inspect_set(
    path: str | Path,
    indices: Sequence[int] | None = None,
    seed: int | None = None,
    n: int = 3,
    checksums: bool = False,
    color: bool = False,
    tokenizer: Any = None,
) -> Found:
    """Show a prepared set.

    Args:
        indices: the samples to show; without, n of them: the first, or with a `seed` drawn by it.
        checksums: read all of every file and compare, not only a part of large ones.
        color: trained text is green.
        tokenizer: the one that it must have been made with; None asks for none.

    Errors: UserError when it is no prepared set or one of another tokenizer or template, and for a
    sample it does not have.
    """
    data = open_set(path, tokenizer)
    manifest = data.manifest
    if indices is None:
        count = min(n, len(data))
        drawn = range(count) if seed is None else _draw(len(data), count, seed)
        indices = [int(index) for index in drawn]
    for index in indices:
        if not 0 <= index < len(data):
            raise UserError(f"{path} has samples 0 to {len(data) - 1}, there is no {index}")
    own = load_tokenizer(data.path / TOKENIZER) if indices else None
    kind = manifest["kind"]
    return Found(
        describe(path, manifest),
        manifest,
        _percentiles(data.lengths),
        _histogram(data.lengths),
        [_shown(own, kind, index, data[index], color) for index in indices],
        damaged_files(data, checksums),
    )


def inspect_file(
    file: str,
    tokenizer_folder: str,
    settings: RowSettings,
    color: bool = False,
    show: int | None = None,
) -> Found:
    """Show how the rows of a file would be tokenised, the first settings.limit of them.

    `show`: so many samples at the most; None is all.

    Errors: UserError as prepare_set raises.
    """
    form = detect_format(settings, [file])
    tokeniser = Tokeniser(load_tokenizer(tokenizer_folder, settings.template), settings, form)
    needed, optional = columns_of(settings, form)
    samples: list[Encoded] = []
    head = [f"{file}: read as {form} with the tokenizer {tokenizer_folder}"]
    for task in cut([file], [*needed, *optional], settings.limit):
        counts = Counts()
        samples += tokeniser.samples(task, counts)
        head += _task_lines(task, counts)
    lengths = np.array([len(sample.tokens) for sample in samples], np.int32)
    kind = "pretrain" if form == "text" else "sft"
    return Found(
        head,
        {"kind": kind, "samples": len(samples)},
        _percentiles(lengths),
        _histogram(lengths),
        [
            _shown(tokeniser.tokenizer, kind, i, sample, color)
            for i, sample in enumerate(samples[:show])
        ],
        [],
    )


def describe(path: str | Path, manifest: Mapping[str, Any]) -> list[str]:
    """A set in a few lines: what it is, what it was made of, what was left out."""
    tokens, trained = manifest["tokens"], manifest["trained_tokens"]
    made, template = manifest["tokenizer"], manifest["template"]
    sources = [source["file"] for source in manifest["sources"]]
    limit = manifest["max_length"]
    lines = [
        f"{path}: {manifest['samples']:,} samples ({manifest['kind']}), {tokens:,} tokens, "
        f"{trained:,} trained ({trained / tokens:.1%}), longest sample {manifest['longest']:,}",
        f"from       {', '.join(sources[:5])}{', ...' if sources[5:] else ''} "
        f"(format {manifest['settings']['format']})",
        f"tokenizer  {made['name']} ({made['hash']})",
    ]
    if template is not None:
        lines.append(f"template   {template['name']} ({template['hash']})")
    if limit is not None:
        lines.append(f"max_length {limit}, truncation {manifest['truncation']}")
    happened = {f"left out, {reason}": count for reason, count in manifest["dropped"].items()}
    happened[f"cut to max_length={limit}"] = manifest["cut"]
    return lines + [
        _happening(what, count["count"], count["places"])
        for what, count in happened.items()
        if count["count"]
    ]


def _happening(what: str, count: int, places: Sequence[str]) -> str:
    more = ", ..." if count > len(places) else ""
    return f"{count} {what}: {', '.join(places)}{more}"


def _task_lines(task: Task, counts: Counts) -> list[str]:
    happened = {f"left out, {reason}": tally for reason, tally in counts.dropped.items()}
    happened["cut to max_length"] = counts.cut
    return [
        _happening(what, tally.count, [place(task, row) for row in tally.rows])
        for what, tally in happened.items()
        if tally.count
    ]


def _draw(total: int, count: int, seed: int) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(seed).choice(total, count, replace=False))


def _percentiles(lengths: NDArray[np.int32]) -> dict[str, int]:
    if not len(lengths):
        return {}
    found = np.percentile(lengths, _PERCENTILES, method="higher")
    named = {f"p{p}": int(value) for p, value in zip(_PERCENTILES, found, strict=True)}
    return {**named, "max": int(lengths.max())}


def _histogram(lengths: NDArray[np.int32]) -> list[tuple[int, int]]:
    """(most tokens, samples) for each power of two from the shortest sample to the longest."""
    if not len(lengths):
        return []
    first, last = (math.ceil(math.log2(max(int(n), 1))) for n in (lengths.min(), lengths.max()))
    edges = [2**power for power in range(first, last + 1)]
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
    return list(zip(edges, counts.tolist(), strict=True))


def _shown(tokenizer: Any, kind: str, index: int, sample: Encoded, color: bool) -> Shown:
    weights = sample.weights.copy()
    if kind == "sft":
        weights[0] = 0  # nothing predicts it; a document's first token follows another document
    pairs = zip(sample.tokens.tolist(), weights.tolist(), strict=True)
    parts = []
    for weight, run in groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append(_marked(text, weight, color))
    return Shown(index, len(sample.tokens), int(np.count_nonzero(weights)), "".join(parts))


def _marked(text: str, weight: float, color: bool) -> str:
    if weight == 0:
        return text
    times = "" if weight == 1 else f"*{weight:.4g}"
    return f"{_GREEN}{text}{times}{_PLAIN}" if color else f"⟦{text}⟧{times}"
