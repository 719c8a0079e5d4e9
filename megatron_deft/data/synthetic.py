"""Sets of random tokens, to measure with: how long opening and reading take at any size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_deft.data.indexed import Block, token_dtype, write_set
from megatron_deft.files import atomic_folder

_BLOCK = 100_000  # samples


def make_synthetic_set(
    out: str | Path, samples: int, mean_length: int = 64, vocab_size: int = 32_000, seed: int = 0
) -> dict[str, Any]:
    """Write a set of random samples and return its manifest; it has no tokenizer.

    Lengths are even over [2, 2 * mean_length - 2]; of each sample, a random half is trained. Takes
    3 bytes per token (5 with a vocabulary from 65,500 on) and 20 per sample. Errors: UserError when
    `out` exists or the disk is too full.
    """
    dtype = token_dtype(vocab_size)
    about: dict[str, Any] = {
        "kind": "sft",
        "max_length": None,
        "truncation": "right",
        "tokenizer": {"name": "none", "hash": "none", "vocab_size": vocab_size},
        "template": None,
        "sources": [],
        "settings": {"format": "synthetic"},
        "dropped": {},
        "cut": {"count": 0, "places": []},
    }
    needs = samples * (mean_length * (np.dtype(dtype).itemsize + 1) + 20)
    with atomic_folder(out, needs=needs) as folder:
        blocks = _blocks(samples, mean_length, vocab_size, seed, dtype)
        return write_set(folder, blocks, (dtype, "uint8"), about)


def _blocks(
    samples: int, mean_length: int, vocab_size: int, seed: int, dtype: str
) -> Iterator[Block]:
    rng = np.random.default_rng(seed)
    for start in range(0, samples, _BLOCK):
        count = min(_BLOCK, samples - start)
        lengths = rng.integers(2, 2 * mean_length - 1, count, dtype=np.int32)
        total = int(lengths.sum())
        tokens = rng.integers(0, vocab_size, total, dtype=dtype)
        yield Block(lengths, tokens, rng.integers(0, 2, total, dtype=np.uint8))
