"""Reading and writing FOLDER/state tensor by tensor: megatron's torch_dist format, streamed.

`megatron.core.dist_checkpointing.save` was rejected here: it wants the whole model in memory, a
process group, a built model and a forked writer. What it writes is torch.distributed.checkpoint
plus two small files, so that is what these functions write, one tensor at a time and without any
process group; megatron's own `dist_checkpointing.load` reads it at any TP/PP layout.

Layers are stored stacked: `decoder.layers.mlp.linear_fc2.weight` has shape [layers, h, f] and every
layer is one chunk of it. Other checkpoints spell the layer in the key (`decoder.layers.3.mlp...`);
both are read.
"""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product, takewhile
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    FileSystemWriter,
    LoadPlan,
    ReadItem,
    SavePlan,
    WriteItem,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from tqdm import tqdm

from megatron_deft.convert.mapping import Slot
from megatron_deft.convert.pickles import DAMAGED, SafeReader, require_safe
from megatron_deft.convert.streams import (
    Output,
    Reached,
    Section,
    by_file,
    nothing_follows,
    read_into,
)
from megatron_deft.errors import TransientError, UserError
from megatron_deft.models.adapters import is_adapter

# CheckpointingConfig of megatron/core/dist_checkpointing/core.py: which reader to use.
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
DATA_SUFFIX = ".distcp"  # of the files that hold tensors
FILE_BYTES = 4 * 2**30  # a new .distcp file begins after this much


@dataclass(frozen=True)
class Chunk:
    """What fills one slot, made only when its turn to be written comes."""

    slot: Slot
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of this piece."""
        return prod(self.slot.shape) * self.dtype.itemsize


def _index(chunk: Chunk) -> MetadataIndex:
    return MetadataIndex(chunk.slot.key, torch.Size(chunk.slot.offsets))


def _region(slot: Slot) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(slot.offsets), torch.Size(slot.shape))


def _write_item(chunk: Chunk) -> WriteItem:
    data = TensorWriteData(
        chunk=_region(chunk.slot),
        properties=TensorProperties(dtype=chunk.dtype),
        size=torch.Size(chunk.slot.size),
    )
    return WriteItem(index=_index(chunk), type=WriteItemType.SHARD, tensor_data=data)


def write_state(
    folder: Path,
    chunks: Sequence[Chunk],
    bar: "tqdm[None]",
    reached: Reached = nothing_follows,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write `chunks` as a torch_dist checkpoint into the new `folder`, holding one at a time.

    Each file is planned as the share of one rank, which is how the format numbers its files.
    FileSystemWriter.write_data was rejected here: it keeps a tensor of every key until the file is
    whole. `reached` is told how far each file is.
    """
    folder.mkdir(parents=True)
    groups = by_file(chunks, file_bytes)
    plans, metadata = create_default_global_save_plan(
        [SavePlan([_write_item(chunk) for chunk in group]) for group in groups]
    )
    results = []
    for number, (plan, group) in enumerate(zip(plans, groups, strict=True)):
        with (
            _without_crc32(),
            Output(folder / f"__{number}_0{DATA_SUFFIX}", reached, bar) as output,
        ):
            results.append(list(map(partial(_save, output), plan.items, group)))
    FileSystemWriter(folder).finish(metadata, results)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(BACKENDS), encoding="utf-8")


def _save(output: Output, item: WriteItem, chunk: Chunk) -> WriteResult:
    """Append one chunk to `output`."""
    tensor = chunk.load().contiguous()
    assert tensor.shape == chunk.slot.shape, (chunk.slot, tensor.shape)
    assert tensor.dtype == chunk.dtype, (chunk.slot, tensor.dtype)
    return append(output, item.index, tensor)


def append(output: Output, index: MetadataIndex, data: Tensor | io.BytesIO) -> WriteResult:
    """Append one record, a tensor or what is pickled already, to a file of tensors.

    Errors: OSError naming the file.
    """
    start = output.end
    if isinstance(data, io.BytesIO):
        output.write(data.getbuffer())
    else:
        assert data.untyped_storage().nbytes() == data.nbytes, "all of it would be written"
        save_into(output, data)
    length = output.end - start
    return WriteResult(index, length, _StorageInfo(output.path.name, start, length))


def save_into(output: Any, data: Any) -> None:
    """torch.save into an Output, whose own error torch would hide behind one of its zip file."""
    try:
        torch.save(data, output)
    except RuntimeError:
        if output.error is not None:
            raise output.error from None
        raise


@contextmanager
def _without_crc32() -> Iterator[None]:
    """torch.save without checksums, which nobody compares: the manifest holds better ones."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _part(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The view of `tensor` that begins at `offsets` and has the shape `lengths`."""
    for dim, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return _part(self._target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


@dataclass(frozen=True)
class _Stack:
    """The chunks of one key by their place in the leading dimensions that each of them has one
    of: layers, layers and experts, or none."""

    dims: int
    chunks: Mapping[tuple[int, ...], list[ChunkStorageMetadata]]

    @staticmethod
    def of(chunks: Sequence[ChunkStorageMetadata]) -> "_Stack":
        sizes = [len(list(takewhile(lambda size: size == 1, chunk.sizes))) for chunk in chunks]
        dims = min(sizes, default=0)
        found: dict[tuple[int, ...], list[ChunkStorageMetadata]] = {}
        for chunk in chunks:
            found.setdefault(tuple(chunk.offsets[:dims]), []).append(chunk)
        return _Stack(dims, found)

    def overlapping(self, slot: Slot) -> list[ChunkStorageMetadata]:
        ranges = map(lambda start, size: range(start, start + size), slot.offsets, slot.shape)
        places = product(*islice(ranges, self.dims))
        return [chunk for place in places for chunk in self.chunks.get(place, ())]


class StateReader:
    """Reads any part of any tensor of a torch_dist checkpoint, whatever layout wrote it."""

    def __init__(self, folder: Path, reached: Reached = nothing_follows) -> None:
        self._folder, self._reached = folder, reached
        self._reader = SafeReader(folder)
        try:
            metadata = self._reader.read_metadata()
        except FileNotFoundError:
            raise UserError(
                f"{folder} holds no .metadata, so it is no megatron dist_checkpointing folder: "
                "name a finished checkpoint"
            ) from None
        self._reader.set_up_storage_reader(metadata, True)
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._stacks: dict[str, _Stack] = {}

    def read(self, slot: Slot) -> Tensor:
        """The tensor in `slot`, in its stored dtype.

        Errors: UserError when the checkpoint does not hold all of it.
        """
        stored = self.tensors[slot.key]
        target = torch.empty(slot.shape, dtype=stored.properties.dtype)
        near = replace(stored, chunks=self._neighbours(slot))
        items = create_read_items_for_chunk_list(slot.key, near, [_region(slot)])
        found = sum(prod(item.lengths) for item in items)
        if found != target.numel():
            raise UserError(
                f"{self._folder}: {slot.key} at {list(slot.offsets)} holds {found} of "
                f"{target.numel()} values: the checkpoint is damaged, use another one"
            )
        for item in items:
            place = self._places[item.storage_index]
            path = self._folder / place.relative_path
            try:
                self._fill(target, item, place, path)
            except DAMAGED as error:
                raise UserError(
                    f"{path} is damaged at {slot.key} ({error}): use another checkpoint"
                ) from None
            self._reached(path, place.offset + place.length)
        return target

    def _neighbours(self, slot: Slot) -> list[ChunkStorageMetadata]:
        """The stored chunks that `slot` can overlap, found by layer and expert.

        Looking at every chunk of a key for every expert of every layer was rejected: 48 layers of
        128 experts took a quarter of an hour.
        """
        if slot.key not in self._stacks:
            self._stacks[slot.key] = _Stack.of(self.tensors[slot.key].chunks)
        return self._stacks[slot.key].overlapping(slot)

    def _fill(self, target: Tensor, item: ReadItem, place: _StorageInfo, path: Path) -> None:
        """Read straight into `target` what lies in one stretch, all else as torch does.

        torch.load was rejected for the former: it holds the tensor twice beside the target.
        """
        wanted = _part(target, item.dest_offsets, item.lengths)
        with open(path, "rb") as handle:
            view: Any = Section(handle, place.offset, place.length)
            saved = torch.load(view, map_location="meta", weights_only=True)
            start = place.offset + _data_offset(view)
        part = _part(saved, item.storage_offsets, item.lengths)
        if wanted.is_contiguous() and part.is_contiguous() and part.dtype == wanted.dtype:
            read_into(wanted, path, start + int(part.storage_offset()) * part.itemsize)
        else:
            self._reader.read_data(LoadPlan([item]), _LoadPlanner(target)).wait()


def _data_offset(saved: Any) -> int:
    """Where the values lie in what torch.save wrote of one tensor: a zip file, not compressed."""
    with zipfile.ZipFile(saved) as archive:
        record = next(i for i in archive.infolist() if i.filename.endswith("/data/0"))
    saved.seek(record.header_offset)
    name, extra = struct.unpack("<26xHH", saved.read(30))  # of the record's own header
    return record.header_offset + 30 + name + extra


def load_state(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """megatron's dist_checkpointing.load of a state folder, whose pickles are looked into first.

    Errors: UserError when the folder holds a pickle that is not safe to read, and when it cannot be
    read although its checksums were right: no reason to take another one, as to try again may help.
    """
    from megatron.core import dist_checkpointing

    require_safe(folder)
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(folder))
        return loaded
    except CheckpointException as error:  # every rank has it, when one of them met something
        rank, (cause, _) = next(iter(error.failures.items()))
        raise TransientError(_not_loaded(folder, f"rank {rank}: {_one_line(cause)}")) from error
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise TransientError(_not_loaded(folder, _one_line(error))) from error


def _not_loaded(folder: Path, cause: str) -> str:
    return f"{folder} cannot be loaded ({cause}): try again, or name another folder"


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(filter(None, (error.filename, error.strerror)))
    return " ".join(f"{type(error).__name__}: {error}".split())


def load_model(model: torch.nn.Module | Sequence[torch.nn.Module], folder: str | Path) -> int:
    """Load FOLDER/state (`folder` is the state folder) into this rank's GPTModel, in its dtype.

    Every rank calls it, with whatever parallel layout the process groups have; with a virtual
    pipeline, `model` is all of the rank's chunks. Rows of vocabulary padding become zero. Heads of
    multi-token prediction that the state does not hold stay as they are.
    returns: how many of those heads it holds
    Errors: UserError as load_state raises; megatron's CheckpointingException or KeyError when a
    parameter is missing or has another shape.
    """
    from megatron_deft.models.heads import chunk_state, count_heads, is_of_head

    heads = count_heads(StateReader(Path(folder)).tensors)

    def is_left_alone(key: str) -> bool:
        # TransformerEngine's fp8 bookkeeping: empty here, and an imported state has none. Adapters
        # begin at zero, or come from a checkpoint of their own.
        return key.endswith("_extra_state") or is_adapter(key) or is_of_head(key, heads)

    chunks = [model] if isinstance(model, torch.nn.Module) else model
    wanted = {
        f"model{i}": {
            key: value for key, value in chunk_state(chunk).items() if not is_left_alone(key)
        }
        for i, chunk in enumerate(chunks)
    }
    # It brings along whatever else the checkpoint keeps in common.pt, such as learning rates.
    loaded = load_state(wanted, Path(folder))
    for i, chunk in enumerate(chunks):
        result = chunk.load_state_dict(loaded[f"model{i}"], strict=False)
        missing = [key for key in result.missing_keys if not is_left_alone(key)]
        assert not missing, missing
        assert not result.unexpected_keys, result.unexpected_keys
    return heads
