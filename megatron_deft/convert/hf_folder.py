"""The files of a Hugging Face model folder: weights, config, tokenizer, model card."""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5_000_000_000  # as transformers splits
STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

# Everything beside the weights that a model is used with; copied as it is.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from `path`. Errors: UserError naming `what` is missing or unreadable."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it is the {what}, download the whole model") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): download it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a JSON object: download it again")
    return data


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` as transformers does: two spaces, a newline at the end."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def companions(folder: Path) -> list[Path]:
    """The files of COMPANIONS that `folder` has."""
    return sorted({p for pattern in COMPANIONS for p in folder.glob(pattern) if p.is_file()})


def copy_companions(source: Path, target: Path) -> None:
    """Copy config, tokenizer, chat template and licence files of `source` to `target`."""
    for path in companions(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies and what it is, from its file's header."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights:
    """The tensors of a folder with model.safetensors or an index and its shards.

    `tensors` is known from the headers; `load` maps a file into memory on first use.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Stored] = {}
        self._open: dict[Path, Any] = {}
        index = read_json(folder / INDEX, "index") if (folder / INDEX).exists() else None
        listed: Mapping[str, str] = index["weight_map"] if index else {}
        for file in sorted(set(listed.values())) if index else [_single_file(folder).name]:
            self._read_header(folder / file)
        stray = sorted(set(listed) ^ set(self.tensors)) if index else []
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
        try:
            handle = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): download it again") from None
        self._open[path] = handle
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            piece = handle.get_slice(name)
            dtype = STORED_DTYPES.get(piece.get_dtype())
            if dtype is None:
                raise UserError(
                    f"{path}: {name} is stored as {piece.get_dtype()}, legal are "
                    f"{', '.join(STORED_DTYPES)}: start from the unquantised model"
                )
            if name in self.tensors:
                raise UserError(f"{name} is in {self.tensors[name].file} and in {path}: keep one")
            self.tensors[name] = Stored(path, dtype, tuple(piece.get_shape()))

    def load(self, name: str) -> Tensor:
        """The tensor `name`, in its stored dtype, backed by the file."""
        return self._open[self.tensors[name].file].get_tensor(name)


def _single_file(folder: Path) -> Path:
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    if pickles:
        raise UserError(
            f"{folder} has {some(pickles)} but no safetensors: convert it once with transformers, "
            "AutoModelForCausalLM.from_pretrained(OLD, dtype='auto').save_pretrained(NEW)"
        )
    raise UserError(f"{folder} has no {SINGLE} and no {INDEX}: download the whole model")


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


def write_weights(folder: Path, pieces: Sequence[Piece], shard_bytes: int = SHARD_BYTES) -> None:
    """Write the tensors as safetensors, one file or shards with an index, one shard in memory."""
    shards: list[list[Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(p.bytes for p in shards[-1]) + piece.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(piece)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else SINGLE
        tensors: dict[str, Tensor] = {}
        for piece in shard:
            tensors.update(piece.load())
        save_file(tensors, folder / file, metadata={"format": "pt"})
        # safetensors keeps its files from everyone else; the folder's own permissions decide.
        (folder / file).chmod(folder.stat().st_mode & 0o666)
        weight_map |= dict.fromkeys(tensors, file)
    if shards[1:]:
        total = sum(piece.bytes for piece in pieces)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / INDEX, index)


def portable_config(
    config: Mapping[str, Any], spec: ModelSpec, dtype: torch.dtype | None
) -> dict[str, Any]:
    """config.json that transformers 4 and 5 read alike.

    transformers 5 writes only `rope_parameters`, which 4 ignores and takes rope_theta 10000; so the
    rotary parameters are written in both spellings, and so is the dtype.
    """
    config = dict(config)
    scaling = {k: v for k, v in (spec.rope_scaling or {}).items() if v is not None}
    config.pop("rope_scaling", None)
    if scaling:
        config["rope_scaling"] = scaling
    rotary: dict[str, Any] = {"rope_theta": spec.rope_theta}
    if spec.rotary_fraction != 1:
        rotary["partial_rotary_factor"] = spec.rotary_fraction
    config |= rotary
    config["rope_parameters"] = {"rope_type": "default", **scaling, **rotary}
    if dtype is not None:
        config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    return config


def portable_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json of transformers 5 in the spelling that 4 reads as well."""
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # 4 wants a dict under this name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def base_name(folder: Path, config: Mapping[str, Any]) -> str:
    """The model a folder holds: its Hub name where it can be told, else the folder's own name."""
    for part in folder.absolute().parts:
        if match := re.fullmatch(r"models--(.+?)--(.+)", part):
            return "/".join(match.groups())
    name = str(config.get("_name_or_path") or "")
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else folder.absolute().name


def model_card(manifest: Mapping[str, Any]) -> str:
    """README.md: what the model is, what it was trained from, with which objective, how long."""
    base, objective, step = (manifest.get(key) for key in ("base", "objective", "step"))
    head = ["library_name: transformers"]
    if base and "/" in base:
        head.append(f"base_model: {base}")
    head += ["tags:", "- megatron_deft"]
    if objective:
        head.append("- " + re.split(r"\W", objective)[0])  # deft of deft(eps=1e-06)
    facts = {
        "Family": manifest["spec"]["family"],
        "Base model": base,
        "Objective": objective,
        "Optimizer steps": step if manifest["kind"] == "training" else None,
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    front = "\n".join(["---", *head, "---"])
    return f"{front}\n\nExported from Megatron by megatron_deft.\n\n" + "\n".join(lines) + "\n"


def some(names: Sequence[str], limit: int = 5) -> str:
    """Names for an error message: the first few, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
