"""Text like a language's, made from a seed: what tokenising is measured on without a download.

Words are syllables, the frequent ones short; a word's frequency falls with its rank as in Zipf's
law, and there are sentences, paragraphs, numbers and formulas. So a tokenizer learnt from it has
the work that it has on English: most words are one token it has met before, some are put together
from several. Rejected: words of random letters, each of which would be new to the tokenizer.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

WORDS = 60_000  # different ones
_ONSETS = (*"bcdfghjklmnprstvwz", *"stlnrmdp", "", "", "st", "th", "pr", "sh", "tr", "qu")
_VOWELS = (*"aeiouaeioe", "ea", "ou", "io")
_CODAS = (*"nrstl", "", "", "", "", "ng", "ck")
_ENDS = ("", ",", ".", ".\n\n", ":\n")
_END_SHARES = (0.87, 0.05, 0.06, 0.015, 0.005)
_OTHERS = 0.03  # share of numbers and formulas
_TURNS = (1, 1, 2, 3)  # pairs of a conversation, as frequent as they stand here
_BLOCK = 1000  # samples


class Writer:
    """Draws texts; the same seed draws the same."""

    def __init__(self, seed: int) -> None:
        self._draw = np.random.default_rng(seed)
        language = np.random.default_rng(0)  # the same for every seed
        self._words = _words(language)
        shares = 1 / (np.arange(WORDS) + 2.7)  # Mandelbrot's correction of Zipf's law
        self._bounds = np.cumsum(shares / shares.sum())

    def texts(self, lengths: NDArray[np.int64]) -> list[str]:
        """One text of so many words for each of `lengths`."""
        count = int(lengths.sum())
        picked = np.minimum(np.searchsorted(self._bounds, self._draw.random(count)), WORDS - 1)
        words = self._words[picked]
        others = np.flatnonzero(self._draw.random(count) < _OTHERS)
        words[others] = [
            _other(*numbers) for numbers in self._draw.integers(0, 1000, (len(others), 3)).tolist()
        ]
        ends = self._draw.choice(len(_ENDS), count, p=_END_SHARES)
        words = words + np.array(_ENDS, object)[ends]
        stops = np.cumsum(lengths)
        return [
            " ".join(words[stop - length : stop]).replace("\n ", "\n").capitalize()
            for stop, length in zip(stops.tolist(), lengths.tolist(), strict=True)
        ]

    def lengths(self, count: int, words: int) -> NDArray[np.int64]:
        """Of so many samples, in words: many short ones and few long ones, `words` on average."""
        spread = 0.6
        drawn = self._draw.lognormal(np.log(words) - spread**2 / 2, spread, count)
        return np.maximum(drawn, 6).astype(np.int64)

    def conversations(self, count: int, words: int) -> Iterator[list[dict[str, str]]]:
        """Chats of user and assistant turns, of `words` words on average; a third is the user's."""
        for start in range(0, count, _BLOCK):
            size = min(_BLOCK, count - start)
            turns = self._draw.choice(_TURNS, size)
            each = np.maximum(self.lengths(size, words) // turns, 6).repeat(turns)
            texts = iter(self.texts(np.stack([each // 3, each - each // 3], 1).ravel()))
            for pairs in turns:
                yield [
                    {"role": role, "content": next(texts)}
                    for _ in range(pairs)
                    for role in ("user", "assistant")
                ]


def write_chat(path: Path, rows: int, words: int, seed: int = 1) -> None:
    """A JSONL file of `messages`."""
    with open(path, "w", encoding="utf-8") as file:
        for messages in Writer(seed).conversations(rows, words):
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def write_columns(path: Path, rows: int, words: int, seed: int = 2) -> None:
    """A parquet file of `extra_info`: question and answer, as in the released data."""
    writer, made = Writer(seed), 0
    columns = pa.schema([("extra_info", pa.struct([("question", "string"), ("answer", "string")]))])
    with pq.ParquetWriter(path, columns, compression="zstd") as file:
        while made < rows:
            size = min(_BLOCK, rows - made)
            lengths = writer.lengths(size, words)
            texts = iter(writer.texts(np.stack([lengths // 3, lengths - lengths // 3], 1).ravel()))
            block: list[Any] = [
                {"extra_info": {"question": question, "answer": answer}}
                for question, answer in zip(texts, texts, strict=True)
            ]
            file.write_table(pa.Table.from_pylist(block, columns))
            made += size


def _words(draw: np.random.Generator) -> NDArray[np.object_]:
    """Different words, the first ones short."""
    found: dict[str, None] = {}
    while len(found) < WORDS:
        syllables = 1 + int(draw.poisson(0.55 * np.log10(1 + len(found) / 40)))
        parts = draw.integers(0, 2**30, (syllables, 3)).tolist()
        word = "".join(
            _ONSETS[a % len(_ONSETS)] + _VOWELS[b % len(_VOWELS)] + _CODAS[c % len(_CODAS)]
            for a, b, c in parts
        )
        found[word] = None
    return np.array(list(found), object)


def _other(first: int, second: int, third: int) -> str:
    if third % 2:
        return str(first * second)
    return f"$x_{{{first % 10}}}^2 + {second} = \\frac{{{first}}}{{{third}}}$"
