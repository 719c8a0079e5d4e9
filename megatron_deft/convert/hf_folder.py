"""The files of a Hugging Face model folder: weights, config, tokenizer, model card."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_deft.convert.safetensors_io import Stored, header_bytes, read_header
from megatron_deft.convert.streams import Output, by_file, bytes_of, nothing_follows
from megatron_deft.errors import UserError
from megatron_deft.files import read_json as load_json
from megatron_deft.hf_files import TOKENIZER_FILES, copy_matching, matching

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000  # as transformers splits

# Everything beside the weights that a model is used with; copied as it is.
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")


def find(name: str | Path) -> Path:
    """The Hugging Face folder that `name` means: a path, or a model in the local Hub cache.

    Nothing is downloaded. Errors: UserError that says how to.
    """
    path = locate(name)
    if path.is_dir():
        return path
    if is_hub_name(str(name)) and not path.exists():
        raise UserError(
            f"{name} is neither a folder nor a model in the local cache: download it first "
            f"(hf download {name})"
        )
    raise UserError(
        f"{name} is not a folder: download the model first (hf download NAME --local-dir DIR)"
    )


def locate(name: str | Path) -> Path:
    """`name` as a path, or where nothing is there the model's folder in the local Hub cache.

    Errors: UserError for an empty name, which as a path would be the current folder.
    """
    path = Path(name)
    if not str(name).strip():
        raise UserError(f"{name!r} is not a folder: name one")
    if path.exists() or not is_hub_name(str(name)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except LocalEntryNotFoundError:
        return path


def is_hub_name(name: str) -> bool:
    """Whether the Hub would take OWNER/MODEL for a name; ./model or ../model are paths."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from `path`. Errors: UserError naming `what` is missing or unreadable."""
    missing = f"{path} is missing: it is the {what}, download the whole model"
    data = load_json(path, missing, "download it again")
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object: download it again")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` as transformers does: two spaces, a newline at the end."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def companions(folder: Path) -> list[Path]:
    """The files of COMPANIONS that `folder` has."""
    return matching(folder, COMPANIONS)


def copy_companions(source: Path, target: Path) -> None:
    """Copy config, tokenizer, chat template and licence files of `source` to `target`."""
    copy_matching(source, target, COMPANIONS)


class Weights:
    """The tensors of a folder with model.safetensors or an index and its shards.

    `tensors` is known from the headers; nothing else is read before `load`.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Stored] = {}
        listed = _weight_map(folder)
        for file in sorted(set(listed.values())) or [_single_file(folder).name]:
            self._read_header(folder / file)
        stray = sorted(set(listed) ^ set(self.tensors)) if listed else []
        stray += [
            n for n, f in listed.items() if n in self.tensors and self.tensors[n].file.name != f
        ]
        if stray:
            raise UserError(
                f"{folder / INDEX} and its files disagree about {some(stray)}: download them again"
            )

    def _read_header(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path} is missing though {INDEX} names it: download it again")
        for name, stored in read_header(path).items():
            if name in self.tensors:
                raise UserError(f"{name} is in {self.tensors[name].file} and in {path}: keep one")
            self.tensors[name] = stored

    def load(self, name: str) -> Tensor:
        """The tensor `name`, in its stored dtype."""
        return self.tensors[name].load()


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name by the index, empty when there is none."""
    path = folder / INDEX
    if not path.exists():
        return {}
    listed = read_json(path, "index").get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
        raise UserError(f"{path} has no weight_map of tensors to files: download it again")
    if not listed:
        raise UserError(f"{path} names no tensor: download it again")
    if (folder / SINGLE).is_file() and set(listed.values()) != {SINGLE}:
        raise UserError(
            f"{folder} has both {SINGLE} and {INDEX}, which names other files: transformers would "
            f"load {SINGLE} alone: keep the one that is the model and remove the other"
        )
    return listed


def _single_file(folder: Path) -> Path:
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    raise UserError(
        pickled(folder) or f"{folder} has no {SINGLE} and no {INDEX}: download the whole model"
    )


def pickled(folder: Path) -> str | None:
    """How to convert a folder whose weights are in pickles alone; None for any other folder."""
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if not pickles or any((folder / name).exists() for name in (SINGLE, INDEX)):
        return None
    return (
        f"{folder} has {some(pickles)} but no safetensors: convert it once with transformers, "
        "AutoModelForCausalLM.from_pretrained(OLD, dtype='auto').save_pretrained(NEW) and "
        "AutoTokenizer.from_pretrained(OLD).save_pretrained(NEW)"
    )


@dataclass(frozen=True)
class Piece:
    """Tensors that are made together and so go into the same file."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    load: Callable[[], Mapping[str, Tensor]]

    @property
    def bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(prod(shape) for shape in self.shapes.values()) * self.dtype.itemsize


def write_weights(
    folder: Path, pieces: Sequence[Piece], shard_bytes: int, bar: "tqdm[None]"
) -> None:
    """Write the tensors as safetensors, one file or shards with an index, one piece in memory."""
    shards = by_file(pieces, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else SINGLE
        _write_shard(folder / file, shard, bar)
        weight_map |= {name: file for piece in shard for name in piece.shapes}
    if shards[1:]:
        total = sum(piece.bytes for piece in pieces)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)


def _write_shard(path: Path, shard: Sequence[Piece], bar: "tqdm[None]") -> None:
    # The widest dtype first keeps every tensor at a multiple of its own width.
    shard = sorted(shard, key=lambda piece: -piece.dtype.itemsize)
    header = {name: (p.dtype, shape) for p in shard for name, shape in p.shapes.items()}
    with Output(path, nothing_follows, bar) as output:
        output.write(header_bytes(header))
        for piece in shard:
            _write_piece(output, piece)


def _write_piece(output: Output, piece: Piece) -> None:
    """A function of its own, so that nothing of a piece outlives its turn."""
    tensors = piece.load()
    for name, shape in piece.shapes.items():
        tensor = tensors[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (piece.dtype, shape), name
        output.write(bytes_of(tensor.contiguous()))


def base_name(folder: Path, config: Mapping[str, Any]) -> str:
    """The model a folder holds: its Hub name where it can be told, else the folder's own name.

    Told by the Hub cache, and by _name_or_path where it ends in the folder's own name. Elsewhere
    that key is a path of another machine, or the model that this one was fine-tuned from.
    """
    folder = folder.absolute()
    for part in folder.parts:
        if match := re.fullmatch(r"models--(.+?)--(.+)", part):
            return "/".join(match.groups())
    name = str(config.get("_name_or_path") or "")
    same = name.rpartition("/")[2].lower() == folder.name.lower()
    return name if same and is_hub_name(name) and not Path(name).exists() else folder.name


def some(names: Sequence[str], limit: int = 5) -> str:
    """Names for an error message: the first few, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
