"""Rows of running text for continued pretraining, by megatron-core's GPTDataset.

A row is `length` + 1 consecutive tokens of documents put one behind the other in a shuffled order;
the next row begins with the last token of the one before, so that every token but the first is
predicted once. Attention reaches over the end of a document, as is usual in pretraining.
Rejected: GPTDataset's own epochs and megatron-core's BlendedDataset. Their orders depend on how
many rows the whole run will take, so that a run resumed to train longer would repeat some and miss
others; ours (data.sampler) do not.
"""

import json
import logging
import shutil
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_128

from megatron_deft.data.indexed import largest_id
from megatron_deft.data.manifest import MANIFEST, TOKENS, read_manifest
from megatron_deft.data.sampler import Indices
from megatron_deft.data.samples import Encoded
from megatron_deft.errors import UserError
from megatron_deft.hashing import hash_file

_LOOKED_AT = 1 << 22  # tokens
_BLOCK = 1 << 20  # documents
_LOG = logging.getLogger(__name__)


class _Tokenizer:
    """What GPTDataset asks of a tokenizer; it makes no ids and masks no token here."""

    eod = -1
    vocab_size = None
    unique_identifiers: ClassVar[dict[str, str]] = {}


class TextRows:
    """Rows of `length` positions from indexed datasets, each one pass over its documents.

    prefixes: what stands before .bin and .idx of each.
    share: the documents of each that count, from and to, as parts of 1.
    cache: folder of the indices that GPTDataset makes once and maps from then on, in a folder for
        each state of each dataset.
    seed: of the documents' order.
    vocab_size: ids that the model's tokenizer has.
    first: makes the indices before the other ranks look for them; called with the function that
        builds (see training.data).

    Errors: UserError for files that are no indexed dataset or of another tokenizer, and with too
    few tokens for one row.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        length: int,
        share: tuple[float, float],
        cache: Path,
        seed: int,
        vocab_size: int,
        first: Callable[[Callable[[], Any]], Any],
    ) -> None:
        self.length, self.packed = length, False
        self._prefixes, self._vocab_size = list(prefixes), vocab_size
        self._description: list[str] = []
        self._datasets = [
            first(partial(self._build, prefix, share, cache, seed, vocab_size))
            for prefix in prefixes
        ]
        parts = [one.unique_description for one in self._datasets]
        parts += [_key(prefix) for prefix in prefixes]
        self.fingerprint = str(xxh3_128("".join(parts).encode()).hexdigest())
        self._firsts = np.cumsum([0, *self.sizes])

    def _build(
        self,
        prefix: str,
        share: tuple[float, float],
        cache: Path,
        seed: int,
        vocab_size: int,
    ) -> Any:
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

        try:
            documents = IndexedDataset(prefix)
        except (AssertionError, ValueError, KeyError, struct.error) as error:
            raise UserError(
                f"{prefix}.idx: no index that megatron-core can read ({error}): prepare it again"
            ) from None
        _check_tokens(prefix, documents, vocab_size)
        begin, end = (round(part * len(documents)) for part in share)
        chosen = np.arange(begin, end, dtype=np.int32)
        tokens = int(documents.sequence_lengths[begin:end].sum(dtype=np.int64))
        if tokens <= self.length:
            raise UserError(
                f"{prefix}: documents {begin} to {end} have {tokens} tokens, too few for a row of "
                f"{self.length} + 1: lower data.max_length, or change data.split"
            )
        indices = cache / _key(prefix)
        _drop_damaged(indices)
        config = GPTDatasetConfig(
            random_seed=seed % 2**32,  # what numpy's RandomState takes
            sequence_length=self.length,
            blend=([prefix], None),
            split=f"{share[0]},{share[1]}",  # part of the cache's name; the documents are chosen
            # GPTDataset knows its indices by the data's name alone: those of a set that was
            # prepared again under this name would point into documents that are no more.
            path_to_cache=str(indices),
            tokenizer=_Tokenizer(),  # type: ignore[arg-type]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        dataset = GPTDataset(documents, prefix, chosen, None, Split.train, config)
        self._description.append(
            f"{prefix}: {len(chosen)} documents, {tokens} tokens; {len(dataset)} rows of "
            f"{self.length}"
        )
        return dataset

    @property
    def sizes(self) -> list[int]:
        """Rows of each dataset."""
        return [len(one) for one in self._datasets]

    def documents(self, row: int) -> list[Encoded]:
        """The one piece of text of a row."""
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        item = self._datasets[number][int(row - self._firsts[number])]
        tokens = torch.cat([item["tokens"], item["labels"][-1:]]).numpy().astype(np.int32)
        _check_ids(self._prefixes[number], tokens, self._vocab_size)
        return [Encoded(tokens, np.ones(len(tokens), np.float32))]

    def positions(self, rows: Indices) -> Indices:
        """Positions that each of `rows` takes in a batch, int64 [n]: all the same."""
        return np.full(len(rows), self.length, np.int64)

    def lengths(self, rows: Indices) -> Indices:
        """Positions of every document of `rows`, without padding: a row is one."""
        return self.positions(rows)

    def describe(self) -> list[str]:
        """A line for each dataset."""
        return self._description


def _check_tokens(prefix: str, documents: Any, vocab_size: int) -> None:
    """Refuse a .bin that is too short for its index, and ids that the tokenizer has not.

    An indexed dataset without a manifest does not say which tokenizer made it. Its first tokens
    betray most: reading a whole corpus at every start would take too long.
    """
    path, dtype = Path(f"{prefix}.bin"), np.dtype(documents.index.dtype)
    size = path.stat().st_size
    for begin in range(0, len(documents.sequence_lengths), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        offsets = documents.index.sequence_pointers[part]
        lengths = documents.sequence_lengths[part].astype(np.int64)
        if min(offsets.min(), lengths.min()) < 0:
            raise UserError(
                f"{prefix}.idx is damaged: it has a document of negative length or place: prepare "
                "it again"
            )
        needed = int((offsets + lengths * dtype.itemsize).max())
        if size < needed:
            raise UserError(
                f"{path} is damaged: it has {size} bytes, its index names {needed}: prepare it "
                "again"
            )
    _check_ids(prefix, np.fromfile(path, dtype, _LOOKED_AT), vocab_size)


def _check_ids(prefix: str, tokens: NDArray[Any], vocab_size: int) -> None:
    if (largest := largest_id(tokens)) >= vocab_size:
        raise UserError(
            f"{prefix}.bin holds token {largest}, the model's tokenizer has {vocab_size}: it was "
            "made with another one, or is damaged: prepare it again"
        )


def _drop_damaged(indices: Path) -> None:
    """Remove a folder of indices that holds anything but plain arrays: it is made again.

    GPTDataset lets numpy load pickles, which is what numpy takes any file for that does not begin
    as an array does: one in a run's folder from outside would run code.
    """
    for path in sorted(indices.glob("*.npy")):
        try:
            np.lib.format.open_memmap(path, mode="r")
        except (ValueError, EOFError) as error:
            _LOG.warning("%s holds no plain array (%s): the indices are made again", path, error)
            shutil.rmtree(indices)
            return


def _key(prefix: str) -> str:
    """Changes with the documents of an indexed dataset: their lengths, or any of their tokens.

    A prepared set has the checksums in its manifest. Without one the tokens count by their size
    alone: reading a whole corpus at every start would take too long.
    """
    path = Path(prefix)
    if path.name == Path(TOKENS).stem and (path.parent / MANIFEST).exists():
        found: Any = read_manifest(path.parent)["files"]
    else:
        found = [Path(f"{prefix}.bin").stat().st_size, hash_file(Path(f"{prefix}.idx"))]
    return str(xxh3_128(json.dumps(found, sort_keys=True).encode()).hexdigest())
