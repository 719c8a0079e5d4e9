"""The measurements of `bench data` that have a process each: `python -m` this NAME JSON.

Each takes the JSON object as its arguments and prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PATTERN = 1 << 20  # samples after which the synthetic set repeats itself
SHORTEST, LONGEST = 10, 30  # tokens of its samples
SEED = 1234
_BATCH = 1000  # texts given to the tokenizer in one call: more were not faster

Found = dict[str, Any]
Indices = NDArray[np.int64]


def encode_texts(texts: str, tokenizer: str, method: str) -> Found:
    """Time the tokenizer's own encode_batch or encode_batch_fast, on all cores.

    texts: a file of JSON strings, one a line; tokenizer: a folder. Returns seconds and tokens.
    Reading the texts and the tokenizer is not timed; the ids are not even looked at.
    """
    from tokenizers import Tokenizer

    encode = getattr(Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json")), method)
    with open(texts, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    blocks = [lines[start : start + _BATCH] for start in range(0, len(lines), _BATCH)]
    tokens = 0
    begin = time.perf_counter()
    for block in blocks:
        tokens += sum(map(len, encode(block, add_special_tokens=False)))
    return {"seconds": time.perf_counter() - begin, "tokens": tokens}


def render_texts(file: str, tokenizer: str, column: str, out: str, times: int) -> Found:
    """Write the whole text of each row as `prepare` renders it, the file `times` times over.

    Returns rows and bytes of text.
    """
    from megatron_deft.data.chat import render_columns, render_messages
    from megatron_deft.data.rows import read_rows
    from megatron_deft.data.tokenizer import load_tokenizer

    used = load_tokenizer(tokenizer)
    count = size = 0
    with open(out, "w", encoding="utf-8") as target:
        for _, row in read_rows([file] * times, [column]):
            value = row[column]
            if column == "messages":
                rendered = render_messages(used, value)
            else:
                rendered = render_columns(used, value["question"], value["answer"])
            text = "".join(rendered.pieces)
            target.write(json.dumps(text) + "\n")
            count, size = count + 1, size + len(text.encode())
    return {"rows": count, "bytes": size}


def pattern() -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """What the synthetic set repeats: lengths int32 [PATTERN], tokens uint16 [sum of them]."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(SHORTEST, LONGEST + 1, PATTERN, dtype=np.int32)
    tokens = draw.integers(3, 259, int(lengths.sum()), dtype=np.uint16)
    return lengths, tokens


def write_synthetic(out: str, tokenizer: str, samples: int) -> Found:
    """Write a set of so many samples, as `prepare` would have left it. Returns samples, tokens."""
    from megatron_deft.data.indexed import Block

    lengths, tokens = pattern()
    weights = (np.arange(len(tokens)) % 3 > 0).astype(np.uint8)

    def blocks() -> Any:
        for start in range(0, samples, PATTERN):
            count = min(PATTERN, samples - start)
            end = int(lengths[:count].sum())
            yield Block(lengths[:count], tokens[:end], weights[:end])

    return _write(Path(out), tokenizer, blocks())


def write_even(out: str, tokenizer: str, samples: int, length: int, ignored: float) -> Found:
    """Write a set of samples that all have `length` positions, a fraction of them not trained."""
    from megatron_deft.data.indexed import Block

    tokens = np.random.default_rng(0).integers(3, 259, samples * (length + 1), dtype=np.uint16)
    trained = (np.arange(length + 1) > round(ignored * length)).astype(np.uint8)
    block = Block(np.full(samples, length + 1, np.int32), tokens, np.tile(trained, samples))
    return _write(Path(out), tokenizer, [block])


def _write(folder: Path, tokenizer: str, blocks: Any) -> Found:
    from megatron_deft import __version__
    from megatron_deft.data.indexed import write_set
    from megatron_deft.data.manifest import TOKENIZER
    from megatron_deft.data.tokenizer import (
        load_tokenizer,
        save_tokenizer,
        template_hash,
        template_text,
        tokenizer_hash,
        vocab_size,
    )

    used = load_tokenizer(tokenizer)
    text = template_text(used)
    folder.mkdir()
    save_tokenizer(Path(tokenizer), used, folder / TOKENIZER)
    about: Found = {
        "megatron_deft": __version__, "transformers": None, "kind": "sft", "max_length": None,
        "truncation": "right", "sources": [], "settings": {}, "dropped": {},
        "cut": {"count": 0, "places": []},
        "tokenizer": {
            "name": "tiny", "hash": tokenizer_hash(used), "vocab_size": vocab_size(used)
        },
        "template": {"name": "its own", "hash": template_hash(text), "text": text},
    }  # fmt: skip
    made = write_set(folder, blocks, ("uint16", "uint8"), about)
    return {"samples": made["samples"], "tokens": made["tokens"]}


def open_synthetic(
    path: str, tokenizer: str, length: int, batch: int, packed: bool, cold: bool
) -> Found:
    """Open a set and make its first global batch, as a run does; time and growth of memory.

    cold: drop the pages of its files from the cache first, so that all is read from the disk.

    Returns seconds of opening (with the check of the tokenizer), of packing and of the first batch;
    by how many bytes resident memory grew, at its peak too, and the process's own part of it (not
    pages of files, which all processes share); and how many samples of the batch are wrong.
    """
    from megatron_deft.data.indexed import open_set
    from megatron_deft.data.loader import Share, load_steps
    from megatron_deft.data.mixture import SampleRows
    from megatron_deft.data.sampler import Stream
    from megatron_deft.data.tokenizer import load_tokenizer

    used = load_tokenizer(tokenizer)
    if cold:
        _drop(Path(path))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is what is resident now
    before, own = _resident("VmRSS"), _resident("RssAnon")
    marks = [time.perf_counter()]
    rows = SampleRows([open_set(path, used)], length, packed, 1, SEED)
    marks.append(time.perf_counter())
    stream = Stream(sum(rows.sizes), SEED)
    marks.append(time.perf_counter())
    numbers = stream.take(0, batch)
    step = next(load_steps(rows, Share(0, 1, batch, 0, 1, 1, packed), iter([numbers])))
    marks.append(time.perf_counter())
    after, peak, own_after = map(_resident, ("VmRSS", "VmHWM", "RssAnon"))
    opening, packing, first = np.diff(marks).tolist()
    samples = [rows.packs[0][int(n)] if packed else np.array([n]) for n in numbers]
    tokens = step.batches[0]["tokens"].reshape(batch, step.length).numpy()
    return {
        "samples": len(rows.sets[0]),
        "rows": sum(rows.sizes),
        "open_seconds": opening,
        "pack_seconds": packing if packed else None,
        "first_batch_seconds": first,
        "seconds": marks[-1] - marks[0],
        "before_bytes": before,
        "own_grown_bytes": own_after - own,
        "grown_bytes": after - before,
        "peak_grown_bytes": peak - before,
        "efficiency": rows.packs[0].efficiency if packed else None,
        "wrong": _wrong(samples, tokens),
    }


def _wrong(rows: Sequence[Indices], found: NDArray[np.int64]) -> int:
    """How many samples do not stand in their row, one behind the other, as they were written.

    rows: the samples of each row; found: the tokens of the batch [rows, length].
    """
    lengths, tokens = pattern()
    ends = np.cumsum(lengths, dtype=np.int64)
    wrong = 0
    for row, samples in zip(found, rows, strict=True):
        place = 0
        for sample in (samples % PATTERN).tolist():
            end, count = int(ends[sample]), int(lengths[sample]) - 1  # the last is only a label
            seen = row[place : place + count]
            wrong += not np.array_equal(seen, tokens[end - count - 1 : end - 1])
            place += count
    return wrong


def pack_set(path: str, capacity: int) -> Found:
    """Pack a set; check that each sample is in one pack and none is too full, count anew.

    Returns samples, rows, seconds, efficiency, longest (positions) and wrong (0 or 1).
    """
    from megatron_deft.data.batches import positions
    from megatron_deft.data.indexed import open_set
    from megatron_deft.data.packing import pack

    found = open_set(path)
    begin = time.perf_counter()
    packs = pack(positions(found.lengths, 1), capacity, SEED)
    seconds = time.perf_counter() - begin
    used = found.lengths.astype(np.int64) - 1
    filled = np.add.reduceat(used[packs.samples], packs.offsets[:-1])
    is_whole = np.array_equal(np.sort(packs.samples), np.arange(len(found)))
    return {
        "samples": len(found),
        "rows": len(packs),
        "seconds": seconds,
        "efficiency": float(used.sum() / (len(filled) * capacity)),
        "longest": int(used.max()),
        "cut": found.manifest["cut"]["count"],
        "wrong": int(not is_whole or bool((filled > capacity).any())),
    }


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.M)
    assert found is not None
    return int(found[1]) * 1024


def _drop(folder: Path) -> None:
    os.sync()
    for path in filter(Path.is_file, folder.iterdir()):
        with open(path, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


PARTS: dict[str, Callable[..., Found]] = {
    call.__name__: call
    for call in (render_texts, encode_texts, write_synthetic, write_even, open_synthetic, pack_set)
}

if __name__ == "__main__":
    print(json.dumps(PARTS[sys.argv[1]](**json.loads(sys.argv[2]))))
