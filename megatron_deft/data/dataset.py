"""Tokenised samples in memory, made from parquet and JSONL files, and their batches.

A data set is three flat arrays, so 100,000 samples of 1,000 tokens take 0.5 GB and no Python object
per sample. Every rank reads and tokenises all of it: nothing is cached on disk that could go stale,
and every rank knows every length, from which it computes the shape of any batch by itself.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_deft.data.chat import encode, render_columns, render_messages
from megatron_deft.data.rows import detect_format, read_rows
FILLER = -1
from megatron_deft.data.samples import IGNORE, Encoded, Rendered
from megatron_deft.errors import UserError

if TYPE_CHECKING:
    from megatron_deft.config import DataConfig

Batch = dict[str, torch.Tensor]


_EMPTY = Encoded(np.zeros(0, np.int32), np.zeros(0, np.float32))
_ROWS_AT_ONCE = 1024  # rows given to the tokenizer in one call, which it shares among threads


@dataclass(frozen=True)
class Dataset:
    """Samples one after another: `tokens` int32 [n], `weights` float32 [n], `offsets` int64 [N+1].

    `format` is "columns" or "messages". `notes` are lines for the log: what was cut and left out.
    """

    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    offsets: NDArray[np.int64]
    format: str
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Encoded:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        where = slice(self.offsets[index], self.offsets[index + 1])
        return Encoded(self.tokens[where], self.weights[where])

    def take(self, indices: Iterable[int]) -> list[Encoded]:
        """The samples at `indices`; FILLER gives an empty one."""
        return [_EMPTY if index == FILLER else self[int(index)] for index in indices]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Positions each sample takes in a batch, int64 [N]: its tokens less one (see collate)."""
        return np.diff(self.offsets) - 1


def load_dataset(
    cfg: "DataConfig",
    files: Sequence[str],
    tokenizer: Any,
    limit: int | None = None,
    progress: bool = False,
) -> Dataset:
    """Read and tokenise the rows of `files`, in order; only the first `limit` rows if given.

    A sample with no trained token among its first `max_length` tokens is left out and named in
    `notes`. A longer sample is cut at its end (truncation "right"), left out and named ("drop"), or
    an error ("error"). `progress` shows a bar on stderr; one rank should.

    Errors: UserError for a file that is missing, empty, damaged or lacks a column, for a row of the
    wrong shape (by number), for what `data.chat` refuses, and when no sample is left.
    """
    if not files:
        raise UserError(
            "no data files: name at least one parquet or JSONL file in data.train_files"
        )
    form = detect_format(cfg, files)
    tally = _Tally(cfg.max_length, cfg.truncation)
    with tqdm(
        total=limit, desc="tokenising", unit=" rows", disable=None if progress else True
    ) as bar:
        for block in _blocks(_render(cfg, form, files, tokenizer, limit)):
            samples = encode(tokenizer, [rendered for _, rendered in block])
            for (where, _), sample in zip(block, samples, strict=True):
                tally.add(where, sample)
            bar.update(len(block))
    if not tally.kept:
        raise UserError(f"{', '.join(files)}: no sample is left to train on: {tally.notes()[0]}")
    return Dataset(
        tokens=np.concatenate([sample.tokens for sample in tally.kept]),
        weights=np.concatenate([sample.weights for sample in tally.kept]),
        offsets=np.cumsum([0, *(len(sample.tokens) for sample in tally.kept)], dtype=np.int64),
        format=form,
        notes=tally.notes(),
    )


def collate(samples: Sequence[Encoded], length: int) -> Batch:
    """Right-pad samples to one batch of int64 [b, length]: tokens, labels and position_ids.

    labels[t] is the token that follows tokens[t], or IGNORE (-100) where that is not trained or is
    padding. A sample of n tokens takes n - 1 positions, as the last one is only a label. Padding is
    token 0, which causal attention hides from every real position: no attention mask is needed.
    """
    tokens = np.zeros((len(samples), length), np.int64)
    labels = np.full((len(samples), length), IGNORE, np.int64)
    for row, sample in enumerate(samples):
        used = max(len(sample.tokens) - 1, 0)
        assert used <= length, f"a sample of {used} positions in a batch of length {length}"
        tokens[row, :used] = sample.tokens[:-1]
        labels[row, :used] = np.where(sample.weights[1:] > 0, sample.tokens[1:], IGNORE)
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.arange(length).repeat(len(samples), 1),
    }


def _render(
    cfg: "DataConfig", form: str, files: Sequence[str], tokenizer: Any, limit: int | None
) -> Iterator[tuple[str, Rendered]]:
    """Each row's place and text."""
    columns = {
        "columns": (cfg.prompt_key, cfg.response_key),
        "messages": (cfg.messages_key,),
    }[form]
    render = {"columns": _columns_row, "messages": _messages_row}[form]
    for where, row in islice(read_rows(files, columns), limit):
        try:
            yield where, render(cfg, row, tokenizer)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


def _columns_row(cfg: "DataConfig", row: Mapping[str, Any], tokenizer: Any) -> Rendered:
    prompt = _text(row, cfg.prompt_key, cfg.prompt_dict_keys, "data.prompt_dict_keys")
    response = _text(row, cfg.response_key, cfg.response_dict_keys, "data.response_dict_keys")
    return render_columns(tokenizer, prompt, response, cfg.use_original_prompt)


def _messages_row(cfg: "DataConfig", row: Mapping[str, Any], tokenizer: Any) -> Rendered:
    messages = row[cfg.messages_key]
    if not isinstance(messages, list):
        raise UserError(
            f"{cfg.messages_key}: expected a list of messages, got {type(messages).__name__}"
        )
    return render_messages(tokenizer, messages)


def _text(row: Mapping[str, Any], column: str, keys: Sequence[str], option: str) -> str:
    """row[column][key][key]...; a list of one stands for its item, as in the released trainers."""
    value, place = row[column], column
    for key in keys:
        while isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, Mapping):
            raise UserError(
                f"{place}: expected an object with {key}, got {type(value).__name__}: set {option}"
            )
        if key not in value:
            raise UserError(f"{place}: no {key}, it has {', '.join(value)}: set {option}")
        value, place = value[key], f"{place}.{key}"
    if not isinstance(value, str):
        has = f" with {', '.join(value)}" if isinstance(value, Mapping) else ""
        raise UserError(f"{place}: expected text, got {type(value).__name__}{has}: set {option}")
    return value


def _blocks(rendered: Iterator[tuple[str, Rendered]]) -> Iterator[list[tuple[str, Rendered]]]:
    while block := list(islice(rendered, _ROWS_AT_ONCE)):
        yield block


class _Tally:
    """Samples kept under the truncation mode, and the places of those that were not."""

    def __init__(self, max_length: int, truncation: str) -> None:
        self.max_length, self.truncation = max_length, truncation
        self.kept: list[Encoded] = []
        self.cut: list[str] = []
        self.too_long: list[str] = []
        self.untrained: list[str] = []

    def add(self, where: str, sample: Encoded) -> None:
        length = len(sample.tokens)
        is_long = length > self.max_length
        if is_long and self.truncation == "error":
            raise UserError(
                f"{where}: {length} tokens, more than data.max_length={self.max_length}: raise it, "
                "or set data.truncation to right or drop"
            )
        sample = Encoded(sample.tokens[: self.max_length], sample.weights[: self.max_length])
        if is_long and self.truncation == "drop":
            self.too_long.append(where)
        elif not sample.weights[1:].any():  # the first token is never a label
            self.untrained.append(where)
        else:
            self.kept.append(sample)
            if is_long:
                self.cut.append(where)

    def notes(self) -> tuple[str, ...]:
        """What happened, a line each, with the count and the first places."""
        limit = f"data.max_length={self.max_length}"
        return tuple(
            f"{len(places)} {what}: {', '.join(places[:5])}{', ...' if len(places) > 5 else ''}"
            for what, places in (
                (f"samples cut to {limit}", self.cut),
                (f"samples left out, longer than {limit}", self.too_long),
                (f"samples left out, no trained token within {limit}", self.untrained),
            )
            if places
        )
