"""Samples side by side as the tensors of one micro-batch: dense rows, or packed ones.

With context parallelism every document (of a dense batch: every row) is padded to a multiple of
2 * context_size and cut into that many chunks, of which rank r holds chunks r and
2 * context_size - 1 - r, in this order: causal attention then costs every rank the same. That is
how megatron-core cuts dense batches and TransformerEngine packed ones. Labels and weights are made
before the cut, so a chunk's last label is the first token of a chunk that may lie elsewhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_deft.data.samples import IGNORE, Encoded

Batch = dict[str, torch.Tensor]
Positions = NDArray[np.int64]

HOST_KEYS = frozenset({"cu_seqlens"})  # read by the host: asking a GPU would wait


def positions(tokens: NDArray[np.integer[Any]], context_size: int = 1) -> Positions:
    """Positions that documents of `tokens` tokens (integers, any shape) take in a batch: int64.

    One less than the tokens, the last of which is only a label; with context parallelism rounded
    up to a multiple of 2 * context_size.
    """
    used = np.maximum(np.asarray(tokens, np.int64) - 1, 0)
    multiple = _multiple(context_size)
    return -(-used // multiple) * multiple


def collate(
    rows: Sequence[Sequence[Encoded]],
    length: int,
    *,
    packed: bool,
    context_size: int = 1,
    context_rank: int = 0,
) -> Batch:
    """One micro-batch of b rows, each of `length` positions over all context-parallel ranks.

    Args:
        rows: the documents of each row; dense rows have one, or none (a filler).
        length: a multiple of 2 * context_size when context_size > 1.
        packed: whether documents of one row are kept apart by cu_seqlens.
        context_size, context_rank: of the context-parallel group; this rank's share is returned.

    Returns, for dense rows [b, length / context_size], for packed ones [1, b * length /
    context_size]:
        tokens: int64; 0 where there is padding, which no real position attends to.
        labels: int64; the token that follows, IGNORE where its weight is 0 or there is padding.
        weights: float32; of each label, 0 where it is IGNORE.
        position_ids: int64; counted from 0 in each document.
        documents: int64; which document of the batch a position is of, counted from 0. Of dense
            rows, the row. In packed rows a run of padding at the end counts as a document.
    and for packed rows also, to be left on the host (HOST_KEYS):
        cu_seqlens: int32 [documents + 1]; where each document begins, over all context-parallel
            ranks, and their end.
    """
    multiple = _multiple(context_size)
    assert rows, "a batch without rows"
    assert length > 0 == length % multiple, f"length {length} is not a multiple of {multiple}"
    assert 0 <= context_rank < context_size
    total = len(rows) * length
    tokens = np.zeros(total, np.int64)
    labels = np.full(total, IGNORE, np.int64)
    weights = np.zeros(total, np.float32)
    lengths: list[int] = []  # of each document, in order
    for number, row in enumerate(rows):
        begin, end = number * length, (number + 1) * length
        assert packed or len(row) <= 1, f"{len(row)} documents in a dense row"
        for sample in row:
            used = len(sample.tokens) - 1
            if used < 1:
                continue
            assert begin + used <= end, f"a row of more than {length} positions"
            where = slice(begin, begin + used)
            tokens[where] = sample.tokens[:-1]
            labels[where] = sample.tokens[1:]
            weights[where] = sample.weights[1:]
            lengths.append(-(-used // multiple) * multiple)
            begin += lengths[-1]
        assert begin <= end, f"a row of more than {length} positions, padding included"
        if begin < end:
            lengths.append(end - begin)
    labels[weights == 0] = IGNORE
    extents = np.array(lengths if packed else [length] * len(rows), np.int64)
    starts = np.cumsum(extents) - extents
    arrays: dict[str, NDArray[Any]] = {
        "tokens": tokens,
        "labels": labels,
        "weights": weights,
        "position_ids": np.arange(total) - np.repeat(starts, extents),
        "documents": np.repeat(np.arange(len(extents)), extents),
    }
    if context_size > 1:
        mine = _share(starts, extents, context_size, context_rank)
        arrays = {name: array[mine] for name, array in arrays.items()}
    shape = (1 if packed else len(rows), -1)
    batch = {name: torch.from_numpy(array.reshape(shape)) for name, array in arrays.items()}
    if packed:
        batch["cu_seqlens"] = torch.from_numpy(np.append(starts, total).astype(np.int32))
    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, but for what the host reads."""
    return {
        name: tensor if name in HOST_KEYS else tensor.to(device, non_blocking=True)
        for name, tensor in batch.items()
    }


def _multiple(context_size: int) -> int:
    return 2 * context_size if context_size > 1 else 1


def _share(starts: Positions, extents: Positions, size: int, rank: int) -> Positions:
    """The positions of rank `rank`: chunks `rank` and 2 size - 1 - rank of every document."""
    chunk = extents // (2 * size)
    firsts = np.stack([starts + rank * chunk, starts + (2 * size - 1 - rank) * chunk], 1).ravel()
    sizes = np.repeat(chunk, 2)
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) + np.repeat(firsts - (ends - sizes), sizes)
