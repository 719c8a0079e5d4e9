"""Prepared sets: tokens on disk as megatron-core reads them, with a parallel stream of weights.

The files are megatron-core's IndexedDataset (one sequence = one document = one sample), so its
GPTDataset opens them as well. They are read and written here by numpy: importing megatron-core
takes seconds, which preparing and inspecting need not wait for, and its index writer is a Python
loop over all samples. Opening maps the index and reads its header alone; the tokens of a sample are
read when it is asked for. Rejected: mapping them as well. Pages that were looked at count as the
process's memory from then on, in pieces of up to 2 MB (600 MB after one batch of a large set), and
a disk that fails would kill the process.
"""

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from weakref import finalize

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from megatron_deft.data.manifest import (
    INDEX,
    TOKENS,
    WEIGHTS,
    read_manifest,
    write_manifest,
)
from megatron_deft.data.samples import Encoded
from megatron_deft.errors import UserError
from megatron_deft.hashing import PIECE, PIECES, hash_file, hash_pieces

# The index: magic, version 1, code of the tokens' dtype, sequences, documents; then the sequences'
# lengths (int32) and byte offsets (int64), and the first sequence of each document (int64, with the
# end of the last one). megatron.core.datasets.indexed_dataset, read by _IndexReader.
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {"uint16": 8, "int32": 4}
_UINT16_VOCABULARY = 65500  # megatron-core's own bound in DType.optimal_dtype
_UNKNOWN = 1 << 32  # a vocabulary that no id is beyond
_UNSIGNED = {width: np.dtype(f"u{width}") for width in (1, 2, 4, 8)}  # megatron-core's widths
_BLOCK = 1 << 20  # samples


def token_dtype(vocab_size: int) -> str:
    """The dtype that ids below `vocab_size` are stored in."""
    return "uint16" if vocab_size < _UINT16_VOCABULARY else "int32"


def write_index(path: str | Path, lengths: Sequence[NDArray[np.int32]], dtype: str) -> None:
    """Write a .idx file; `lengths` are the tokens of each sample, in any number of int32 arrays."""
    count = sum(map(len, lengths))
    with open(path, "wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype], count, count + 1))
        for block in lengths:
            file.write(np.ascontiguousarray(block, np.int32).data)
        end = 0
        for block in lengths:
            ends = end + np.cumsum(block, dtype=np.int64)
            file.write(((ends - block) * np.dtype(dtype).itemsize).data)
            end = int(ends[-1]) if len(ends) else end
        for start in range(0, count + 1, _BLOCK):
            file.write(np.arange(start, min(start + _BLOCK, count + 1), dtype=np.int64).data)


class TokenSet:
    """The samples of a prepared set; each is read from the disk when it is asked for.

    path: its folder.
    manifest: see data.manifest.read_manifest.
    lengths: int32 [N], tokens of each sample; a view of the mapped index, to be read only.
    """

    def __init__(self, path: str | Path) -> None:
        """Looks at the files' sizes; `damaged_files` at what is in them.

        Errors: UserError when the folder is not a whole prepared set.
        """
        self.path = Path(path)
        self.manifest = read_manifest(path)
        self._dtype = np.dtype(self.manifest["token_dtype"])
        self._vocab_size = self.manifest["tokenizer"].get("vocab_size", _UNKNOWN)
        count, tokens = self.manifest["samples"], self.manifest["tokens"]
        width = self.manifest["weight_dtype"]
        self._tokens = _Values(self._file(TOKENS, tokens * self._dtype.itemsize), self._dtype)
        self._weights = None
        if width is not None:
            kind = np.dtype(width)
            self._weights = _Values(self._file(WEIGHTS, tokens * kind.itemsize), kind)
        size = _HEADER.size + 20 * count + 8
        index = np.asarray(np.memmap(self._file(INDEX, size), np.uint8, "r"))
        expected = (_MAGIC, 1, _CODES[self._dtype.name], count, count + 1)
        self.lengths: NDArray[np.int32] = np.frombuffer(index, np.int32, count, _HEADER.size)
        self._offsets = np.frombuffer(index, np.int64, count, _HEADER.size + 4 * count)
        whole = count > 0 and _HEADER.unpack(index[: _HEADER.size].tobytes()) == expected
        if not whole or int(self._offsets[-1]) // self._dtype.itemsize + self.lengths[-1] != tokens:
            raise _damaged(self.path / INDEX, "it is of another set")

    def _file(self, name: str, expected: int) -> Path:
        path = self.path / name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise _damaged(path, "it is missing") from None
        if size != expected:
            raise _damaged(path, f"it has {size} bytes, the manifest says {expected}")
        return path

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Encoded:
        """Errors: UserError for a sample that the set cannot have, IndexError beyond the last."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = int(self._offsets[index]) // self._dtype.itemsize
        count = int(self.lengths[index])
        if not (start >= 0 and 0 <= count <= self.manifest["longest"]):
            where = f"{count} tokens from {start} on"
            raise _damaged(self.path / INDEX, f"sample {index} would be {where}")
        tokens = self._tokens.read(start, count)
        if (largest := largest_id(tokens)) >= self._vocab_size:
            what = f"sample {index} holds token {largest}, its tokenizer has {self._vocab_size}"
            raise _damaged(self.path / TOKENS, what)
        tokens = tokens.astype(np.int32)
        if self._weights is None:
            return Encoded(tokens, np.ones(count, np.float32))
        return Encoded(tokens, self._weights.read(start, count).astype(np.float32))

    def __reduce__(self) -> tuple[type["TokenSet"], tuple[Path]]:
        return TokenSet, (self.path,)  # a worker opens the files itself


class _Values:
    """The array in a file, of which stretches are read. Processes that are forked may share it."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - until nobody has it any more
        finalize(self, self._file.close)

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Elements [start, start + count), to be read only."""
        width = self._dtype.itemsize
        try:
            data = os.pread(self._file.fileno(), count * width, start * width)
        except OSError as error:
            raise _named(error, self._path) from None
        if len(data) != count * width:
            raise _damaged(self._path, "it became shorter")
        return np.frombuffer(data, self._dtype)


def _named(error: OSError, path: Path) -> OSError:
    """The error with the file's name, which that of a disk that fails has not."""
    return OSError(error.errno, error.strerror, str(path))


def largest_id(tokens: NDArray[Any]) -> int:
    """The largest of token ids, uint16 or int32 [n]; a negative one counts as 2**32 more. 0: none.

    One that a model has no embedding for would end the run within a kernel.
    """
    return int(np.maximum.reduce(tokens.view(_UNSIGNED[tokens.itemsize]), initial=0))


def damaged_files(data: TokenSet, checksums: bool = False) -> list[str]:
    """The names of a set's files that are not those it was made with.

    Reads the index, and of the others as much as hash_pieces does: the time does not grow with the
    tokens. `checksums`: all of every file.
    """
    pieces = data.manifest.get("pieces", {})

    def is_same(name: str, made: dict[str, Any]) -> bool:
        path = data.path / name
        try:
            if checksums or name == INDEX:
                return hash_file(path) == made
            known = made["xxh3_128"] if made["bytes"] <= PIECE * PIECES else pieces.get(name)
            return known in (None, hash_pieces(path))
        except OSError as error:
            raise _named(error, path) from None

    return [name for name, made in data.manifest["files"].items() if not is_same(name, made)]


def require_whole(data: TokenSet) -> None:
    """Errors: UserError when damaged_files names a file."""
    for name in damaged_files(data):
        raise _damaged(data.path / name, "it does not match its checksum")


def open_set(path: str | Path, tokenizer: Any = None) -> TokenSet:
    """Open a prepared set; with a `tokenizer`, only if it is the one the set was made with.

    Takes the same time and memory whatever the number of samples.

    Errors: UserError when `path` is no prepared set or a damaged one, and when `tokenizer` makes
    other ids, or has another chat template than the one that was used.
    """
    found = TokenSet(path)
    if tokenizer is not None:
        check_tokenizer(found.path, found.manifest, tokenizer)
    return found


def check_tokenizer(path: Path, manifest: dict[str, Any], tokenizer: Any) -> None:
    """Errors: UserError when the set was made with another tokenizer or chat template."""
    from megatron_deft.data.tokenizer import template_hash, template_text, tokenizer_hash

    made, template = manifest["tokenizer"], manifest["template"]
    name = tokenizer.name_or_path or type(tokenizer).__name__
    found = tokenizer_hash(tokenizer)
    if found != made["hash"]:
        raise UserError(
            f"{path} was made with another tokenizer ({made['name']}, {made['hash']}) than {name} "
            f"({found}): prepare it again with --tokenizer {name}, or use the tokenizer in "
            f"{path / 'tokenizer'}"
        )
    if template is None:
        return
    shown = template_hash(template_text(tokenizer))
    if shown != template["hash"]:
        raise UserError(
            f"{path} was made with another chat template ({template['name']}, {template['hash']}) "
            f"than that of {name} ({shown}): prepare it again with this template, or give the "
            f"model the tokenizer in {path / 'tokenizer'}"
        )


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}: prepare the set again")


class Block(NamedTuple):
    """Samples one after another: lengths int32 [n], tokens and weights [sum of lengths].

    weights None: every token is trained.
    """

    lengths: NDArray[np.int32]
    tokens: NDArray[Any]
    weights: NDArray[Any] | None


def write_set(
    folder: Path, blocks: Iterable[Block], dtypes: tuple[str, str | None], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the files of a set into `folder`, one block in memory, and return its manifest.

    Args:
        dtypes: of tokens and weights, None for no weights.
        about: the keys of the manifest that the samples themselves do not tell.
    """
    lengths: list[NDArray[np.int32]] = []
    trained = 0
    with ExitStack() as stack:
        tokens, weights = (
            None if dtype is None else stack.enter_context(_Stream(folder / name, dtype))
            for name, dtype in zip((TOKENS, WEIGHTS), dtypes, strict=True)
        )
        assert tokens is not None
        for block in blocks:
            lengths.append(block.lengths)
            tokens.write(block.tokens)
            if weights is None or block.weights is None:
                trained += len(block.tokens)
                continue
            weights.write(block.weights)
            firsts = np.cumsum(block.lengths, dtype=np.int64) - block.lengths
            trained += int(np.count_nonzero(block.weights))
            trained -= int(np.count_nonzero(block.weights[firsts]))
    write_index(folder / INDEX, lengths, tokens.dtype.name)
    files = {stream.path.name: stream.fingerprint() for stream in (tokens, weights) if stream}
    counts = {
        "samples": sum(map(len, lengths)),
        "tokens": sum(int(block.sum(dtype=np.int64)) for block in lengths),
        "trained_tokens": trained,
        "longest": max((int(block.max()) for block in lengths if len(block)), default=0),
        "token_dtype": dtypes[0],
        "weight_dtype": dtypes[1],
    }
    pieces = {name: hash_pieces(folder / name) for name in files}
    files[INDEX] = hash_file(folder / INDEX)
    return write_manifest(folder, {**counts, **about, "files": files, "pieces": pieces})


class _Stream:
    """A file of one array that grows, with its checksum."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self._digest, self._size = xxh3_128(), 0

    def __enter__(self) -> "_Stream":
        self._file = open(self.path, "wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, values: NDArray[Any]) -> None:
        data = np.ascontiguousarray(values, self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def fingerprint(self) -> dict[str, Any]:
        return {"bytes": self._size, "xxh3_128": self._digest.hexdigest()}
