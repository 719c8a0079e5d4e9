"""Pickles of a checkpoint that may come from outside, read without running what they name.

FOLDER/state holds them in four places: `.metadata`, `common.pt`, byte records among the tensors
(random generators, _extra_state of modules), and within such a record the bytes that
TransformerEngine unpickles. torch and megatron-core read the first, the third and the last with
Python's own unpickler, which calls whatever it is told to. So `require_safe` reads all of them
first, calling nothing but what is listed here, and megatron-core opens only what has passed.
"""

import io
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import EnumMeta
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_deft.convert.streams import Section
from megatron_deft.errors import UserError

COMMON = "common.pt"
EXTRA_STATE = "_extra_state"
_CHECKPOINT = "torch.distributed.checkpoint"
# What `.metadata` is made of: of each module, these names.
METADATA: Mapping[str, frozenset[str]] = {
    f"{_CHECKPOINT}.metadata": frozenset({
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    }),
    # megatron-core keeps the plan that the files were written by
    f"{_CHECKPOINT}.planner": frozenset({
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    }),
    f"{_CHECKPOINT}.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    "torch": frozenset({"Size"}),  # and the dtypes
    "torch.serialization": frozenset({"_get_layout"}),
    "pathlib": frozenset({"Path", "PosixPath", "PurePosixPath"}),
    "collections": frozenset({"OrderedDict"}),
}  # fmt: skip
# TransformerEngine's bookkeeping: tensors, and a recipe of its own.
EXTRA: Mapping[str, frozenset[str]] = {
    "torch": frozenset({"Size", "device"}),
    "torch._utils": frozenset({"_rebuild_tensor_v2"}),
    "collections": frozenset({"OrderedDict"}),
}
RECIPES = "transformer_engine.common.recipe"


# What reading a file with a wrong byte raises.
DAMAGED = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    RuntimeError,
    StopIteration,
    struct.error,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    EOFError,
    OverflowError,
    MemoryError,  # a length that no file has
)


class _Refused(Exception):  # noqa: N818 (a name, not an error)
    """A pickle asked for this global."""


class _Unpickler(pickle.Unpickler):
    """Finds what is listed, and nothing else."""

    def __init__(
        self, file: Any, listed: Mapping[str, frozenset[str]], more: Mapping[str, Any]
    ) -> None:
        super().__init__(file)
        self._listed, self._more = listed, more

    def find_class(self, module: str, name: str) -> Any:
        """See pickle.Unpickler. A name with dots would reach beyond the module: none is listed."""
        full = f"{module}.{name}"
        if full in self._more:
            return self._more[full]
        if full == "builtins.getattr":
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if name in self._listed.get(module, ()) or is_dtype:
            return super().find_class(module, name)
        if module == RECIPES and name.isidentifier() and self._more:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == RECIPES:  # not what it imports
                return found
        raise _Refused(full)


def _member(listed: Any, name: Any) -> Any:
    """What of `getattr` is harmless: Python 3.11.0 to 3.11.3 pickle members of enumerations so."""
    if isinstance(listed, EnumMeta) and name in listed.__members__:
        return listed[name]
    raise _Refused("builtins.getattr")


class SafeReader(FileSystemReader):
    """torch's reader, whose metadata can name nothing but itself."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See FileSystemReader. Errors: UserError when it names anything else, or other files."""
        path = Path(self.path) / ".metadata"
        with open(path, "rb") as handle, _refusing(path):
            metadata = _Unpickler(handle, METADATA, {}).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f"it is a {type(metadata).__name__}")
            for place in (metadata.storage_data or {}).values():
                name = str(place.relative_path)
                if name in ("", ".", "..") or "/" in name:
                    raise UserError(f"{path} names {name}, which is no file beside it: {_REMEDY}")
        return metadata


_REMEDY = "whoever made the folder may mean harm; use one from a source you trust"


@contextmanager
def _refusing(path: Path, key: str = "") -> Iterator[None]:
    where = f"{path}, record {key}," if key else str(path)
    try:
        yield
    except UserError:
        raise
    except _Refused as error:
        name = str(error)
    except DAMAGED as error:
        # torch's own, of weights_only=True: many lines, and the name in one of them
        why = re.sub(r"\s+", " ", str(error))[:200]
        found = re.search(r"GLOBAL ([\w.]+\.\w+)", str(error))
        if found is None:
            raise UserError(f"{where} is damaged ({why}): use another checkpoint") from None
        name = found[1]
    else:
        return
    raise UserError(
        f"{where} asks for {name}, which no checkpoint needs; nothing of it was run: {_REMEDY}"
    )


def require_safe(folder: str | Path) -> None:
    """Vet every pickle of a state folder before megatron-core reads it.

    Errors: UserError naming the file and the global that it asks for, or what is damaged.
    """
    folder = Path(folder)
    metadata = SafeReader(folder).read_metadata()
    if (folder / COMMON).exists():
        with open(folder / COMMON, "rb") as handle:
            _vet(handle, folder / COMMON)
    with _refusing(folder / ".metadata"):
        _vet_records(folder, metadata)


def _vet_records(folder: Path, metadata: Metadata) -> None:
    seen = set()
    for index, place in metadata.storage_data.items():
        entry = metadata.state_dict_metadata.get(index.fqn)
        where = (place.relative_path, place.offset, place.length)
        is_extra = EXTRA_STATE in index.fqn
        if not isinstance(entry, BytesStorageMetadata) or (*where, is_extra) in seen:
            continue
        seen.add((*where, is_extra))
        path = folder / place.relative_path
        if getattr(place, "transform_descriptors", None):
            raise UserError(f"{path} holds {index.fqn} in a form that is not read: {_REMEDY}")
        if not os.path.isfile(path):
            raise ValueError(f"it names {path.name}, which is no file beside it")
        with open(path, "rb") as handle:
            record = _vet(Section(handle, place.offset, place.length), path, index.fqn)
        if is_extra:
            _vet_extra(record, path, index.fqn)


def _vet(file: Any, path: Path, key: str = "") -> Any:
    """What torch.save wrote, of plain values, tensors and numpy arrays alone."""
    with _refusing(path, key), torch.serialization.safe_globals(_GENERATORS):
        return torch.load(file, map_location="cpu", weights_only=True)


# The state of numpy's generator is an array; both names that numpy gives the function.
_RECONSTRUCT: Any = numpy.empty(0).__reduce__()[0]
_GENERATORS: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    numpy.ndarray,
    numpy.dtype,
    type(numpy.dtype(numpy.uint32)),
    io.BytesIO,
]


def _vet_extra(record: Any, path: Path, key: str) -> None:
    """TransformerEngine unpickles the bytes in such a tensor, or loads them with torch."""
    for value in _leaves(record):
        if isinstance(value, io.BytesIO):
            _vet(io.BytesIO(value.getvalue()), path, key)
        elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.numel():
            data = io.BytesIO(value.numpy().tobytes())
            within = {"torch.storage._load_from_bytes": lambda b: _vet(io.BytesIO(b), path, key)}
            with _refusing(path, key):
                _Unpickler(data, EXTRA, within).load()


def _leaves(value: Any) -> Iterator[Any]:
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple):
        for part in parts:
            yield from _leaves(part)
    else:
        yield value
