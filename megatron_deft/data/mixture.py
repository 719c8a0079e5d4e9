"""The rows of a run: samples of prepared sets, each a row of its own or packed with others."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from xxhash import xxh3_128

from megatron_deft.data.batches import positions
from megatron_deft.data.indexed import TokenSet
from megatron_deft.data.packing import Packs, pack
from megatron_deft.data.sampler import Indices
from megatron_deft.data.samples import Encoded


class Rows(Protocol):
    """What batches are made of."""

    @property
    def sizes(self) -> list[int]:
        """Rows of each set; rows are numbered through."""

    @property
    def fingerprint(self) -> str:
        """Changes when any row does."""

    @property
    def packed(self) -> bool:
        """Whether rows hold several documents, kept apart."""

    def documents(self, row: int) -> list[Encoded]:
        """The samples of a row, in order."""

    def positions(self, rows: Indices) -> Indices:
        """Positions that each of `rows` takes in a batch, int64 [n]."""

    def lengths(self, rows: Indices) -> Indices:
        """Positions of every document of `rows`, without padding, int64 [documents]."""


class SampleRows:
    """Rows of prepared sets for fine-tuning.

    sets: opened; none has a sample of more than max_length tokens (see data.check).
    max_length: positions of a packed row.
    packed: rows hold several samples of one set; else each sample is a row.
    context_size: of the context-parallel group; packed samples are padded for it.
    seed: of which samples of equal length share a pack.
    limit: only the first so many samples, over all sets; None: all.
    """

    def __init__(
        self,
        sets: Sequence[TokenSet],
        max_length: int,
        packed: bool,
        context_size: int,
        seed: int,
        limit: int | None = None,
    ) -> None:
        self.sets, self.context_size = list(sets), context_size
        ends = np.cumsum([0, *map(len, self.sets)])
        if limit is not None:
            ends = np.minimum(ends, limit)
        self._counts = [int(count) for count in np.diff(ends)]
        self.max_length, self.packed, self.seed = max_length, packed, seed

    @cached_property
    def packs(self) -> list[Packs]:
        """The packs of each set."""
        return [
            pack(positions(one.lengths[:count], self.context_size), self.max_length, self.seed)
            for one, count in zip(self.sets, self._counts, strict=True)
        ]

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each set."""
        return [len(one) for one in self.packs] if self.packed else self._counts

    @cached_property
    def _firsts(self) -> Indices:
        return np.cumsum([0, *self.sizes])

    @property
    def fingerprint(self) -> str:
        """Of the sets' files, and of what decides about packs."""
        parts: list[Any] = [one.manifest["files"] for one in self.sets]
        if self.packed:
            parts += [self.max_length, self.context_size, self.seed]
        return str(xxh3_128(json.dumps(parts, sort_keys=True).encode()).hexdigest())

    def documents(self, row: int) -> list[Encoded]:
        """The samples of a row, in order."""
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        one, local = self.sets[number], int(row - self._firsts[number])
        if not self.packed:
            return [one[local]]
        return [one[int(sample)] for sample in self.packs[number][local]]

    def positions(self, rows: Indices) -> Indices:
        """Positions that each of `rows` takes in a batch, int64 [n]."""
        numbers = np.searchsorted(self._firsts, rows, side="right") - 1
        found = np.empty(len(rows), np.int64)
        for number in np.unique(numbers):
            here = numbers == number
            local = rows[here] - self._firsts[number]
            if self.packed:
                found[here] = self.packs[number].fill[local]
            else:
                found[here] = positions(self.sets[number].lengths[local], self.context_size)
        return found

    def lengths(self, rows: Indices) -> Indices:
        """Positions of every document of `rows`, without padding, int64 [documents]."""
        numbers = np.searchsorted(self._firsts, rows, side="right") - 1
        found = [np.empty(0, np.int64)]
        for number in np.unique(numbers):
            samples = rows[numbers == number] - self._firsts[number]
            if self.packed:
                packs = self.packs[number]
                samples = np.concatenate([packs[int(row)] for row in samples])
            found.append(positions(self.sets[number].lengths[samples]))
        return np.concatenate(found)

    def describe(self) -> list[str]:
        """A line for each set: samples, tokens, and how well they pack."""
        lines = []
        for number, one in enumerate(self.sets):
            about = one.manifest
            line = (
                f"{one.path}: {len(one)} samples, {about['tokens']} tokens, "
                f"{about['trained_tokens']} of them trained"
            )
            if self._counts[number] < len(one):
                line += f"; the first {self._counts[number]} samples are used"
            if self.packed:
                packs = self.packs[number]
                line += f"; in {len(packs)} rows of {self.max_length}, {packs.efficiency:.2%} full"
            lines.append(line)
        return lines
