"""The safetensors format tensor by tensor: safetensors' own `save_file` wants a whole file at once.

    8 bytes    length of the header, little endian
    header     JSON: name -> dtype, shape, data_offsets (from the header's end), and __metadata__
    data       the tensors one after the other, without holes

Format: https://github.com/huggingface/safetensors, README. The library checks what is read here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_deft.convert.streams import read_into
from megatron_deft.errors import UserError

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
LENGTH = 8  # bytes of the header's length, and what the header is padded to


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies and what it is, from its file's header."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """The tensor, in memory of its own. Errors: UserError when the file was cut short."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        read_into(tensor, self.file, self.offset)
        return tensor


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of the file by name.

    Errors: UserError when the file is damaged, cut short, or holds a dtype we do not convert.
    """
    try:
        # Checks header and size; the data is not touched. framework="pt" was rejected: torch maps
        # the file for writing, which a system refuses whose memory is smaller than the file.
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from None
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(LENGTH), "little")
        header: dict[str, dict[str, Any]] = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    return {
        name: _stored(path, name, entry, LENGTH + length)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


def _stored(path: Path, name: str, entry: Mapping[str, Any], start: int) -> Stored:
    dtype = STORED_DTYPES.get(entry["dtype"])
    if dtype is None:
        raise UserError(
            f"{path}: {name} is stored as {entry['dtype']}, legal are "
            f"{', '.join(STORED_DTYPES)}: start from the unquantised model"
        )
    return Stored(path, dtype, tuple(entry["shape"]), start + entry["data_offsets"][0])


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """What a file begins with whose data are `tensors` (name -> dtype, shape), in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH)
    return len(text).to_bytes(LENGTH, "little") + text
