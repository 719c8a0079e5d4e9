"""What a folder is, from its headers alone: config, manifest, names and shapes of tensors.

No weight is read. With checksums every file of a folder of ours is, as `checkpoint_folder.verify`
does it; a Hugging Face folder has none.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert import hf_folder
from megatron_deft.convert.hf_folder import Weights, locate, read_json
from megatron_deft.convert.safetensors_io import Stored
from megatron_deft.convert.sources import OPTIMIZER_PREFIXES, account
from megatron_deft.convert.state import StateReader
from megatron_deft.convert.tokens import has_tokenizer
from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec, spec_from_hf

KINDS = {
    "weights": "imported weights",
    "training": "training checkpoint",
    "adapters": "training checkpoint of adapters",
}
METADATA = "state/.metadata"
# Field of a ModelSpec -> key of a config.json, for a family that cannot be converted.
HF_KEYS = {
    "family": "model_type",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "tied_embeddings": "tie_word_embeddings",
}


@dataclass(frozen=True)
class Entry:
    """One stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # such as "bfloat16"
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What was found in a folder."""

    path: str  # of a run: its checkpoint
    kind: str
    architecture: dict[str, Any]  # as in a ModelSpec
    convertible: str | None  # why not; None when it is
    origin: dict[str, Any]  # base, step, objective, data, layout: what of it is known; tokenizer
    problems: list[str]  # empty when the folder is whole
    checksums: bool  # whether they were compared
    tensors: list[Entry]  # of the model, in the order of their names
    optimizer: list[Entry]

    def to_json(self, tensors: bool = False) -> dict[str, Any]:
        """Everything, the tensors counted and only on demand listed."""
        data = asdict(self)
        listed = data.pop("tensors")
        data["parameters"] = _count(self.tensors)
        data["optimizer"] = _count(self.optimizer) if self.optimizer else None
        return {**data, "tensors": listed} if tensors else data


def inspect(path: str | Path, checksums: bool = False) -> Inspection:
    """Look at a Hugging Face folder, or at a weights, checkpoint or run folder.

    `path` may be a model in the local Hub cache. Names and shapes of tensors are compared with the
    config, sizes of files with the manifest; weights in pickles are not looked into.

    Errors: UserError when it is none of these, or when its config or manifest cannot be read;
    anything else that is wrong is in `problems`.
    """
    path = locate(path)
    if (path / "config.json").is_file() and not (path / folders.MANIFEST).exists():
        return _hugging_face(path)
    return _ours(folders.resolve(path), checksums)


def _hugging_face(path: Path) -> Inspection:
    config = read_json(path / "config.json", "model's config")
    problems: list[str] = []
    stored: Mapping[str, Stored] = {}
    pickled = why = hf_folder.pickled(path)
    spec = None
    try:
        spec = spec_from_hf(config)
    except UserError as error:
        why = str(error)
    try:
        stored = {} if pickled else Weights(path).tensors
        if spec is not None and stored:
            account(path, spec, stored)
    except UserError as error:
        problems.append(str(error))
    said = {field: config.get(key) for field, key in HF_KEYS.items()}
    return Inspection(
        str(path),
        "Hugging Face",
        said if spec is None else spec.to_json(),
        why,
        _tokenizer(path),
        problems,
        False,
        [_entry(name, t.shape, t.dtype) for name, t in sorted(stored.items())],
        [],
    )


def _tokenizer(folder: Path) -> dict[str, str]:
    """Named where there is none only."""
    return {} if has_tokenizer(folder) else {"tokenizer": "none"}


def _ours(path: Path, checksums: bool) -> Inspection:
    manifest = folders.read_manifest(path)
    problems = [*folders.verify(path, checksums), *folders.strays(path)]
    stored: Mapping[str, Any] = {}
    if not any(problem.startswith(METADATA) for problem in problems):
        stored = StateReader(path / "state").tensors
    entries = [
        _entry(name, tuple(t.size), t.properties.dtype) for name, t in sorted(stored.items())
    ]
    return Inspection(
        str(path),
        KINDS["adapters" if manifest.get("adapter") else manifest["kind"]],
        ModelSpec.from_json(manifest["spec"]).to_json(),
        None,
        {**_origin(manifest), **_tokenizer(path / "hf")},
        problems,
        checksums,
        [entry for entry in entries if not entry.name.startswith(OPTIMIZER_PREFIXES)],
        [entry for entry in entries if entry.name.startswith(OPTIMIZER_PREFIXES)],
    )


def _origin(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest tells of where the weights come from."""
    data = (manifest.get("config") or {}).get("data") or {}
    found = {
        "base": manifest.get("base"),
        "step": manifest.get("step") if manifest["kind"] == "training" else None,
        "objective": manifest.get("objective"),
        "data": data.get("train_files"),
        "samples": manifest.get("consumed"),
        "layout": manifest.get("layout"),
        "adapters": _adapters(manifest.get("adapter")),
    }
    return {name: value for name, value in found.items() if value is not None}


def _adapters(entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of a checkpoint of adapters: what they are, and the base whose weights they need."""
    if entry is None:
        return None
    shown = {name: entry[name] for name in ("rank", "alpha", "rslora", "targets")}
    return {**shown, "of": entry["base"]["path"]}


def _entry(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Entry:
    return Entry(name, shape, str(dtype).removeprefix("torch."), prod(shape) * dtype.itemsize)


def _count(entries: Iterable[Entry]) -> dict[str, Any]:
    """Values and bytes in all, values by dtype."""
    entries = list(entries)
    dtypes: Counter[str] = Counter()
    for entry in entries:
        dtypes[entry.dtype] += prod(entry.shape)
    return {
        "count": sum(dtypes.values()),
        "bytes": sum(entry.bytes for entry in entries),
        "dtypes": dict(dtypes.most_common()),
    }


def describe(found: Inspection, tensors: bool = False) -> str:
    """The inspection as text, a line per fact and on demand a line per tensor."""
    whole = "whole" if found.tensors else "weights not looked into"
    whole = "NOT WHOLE" if found.problems else whole
    checked = ", every checksum right" if found.checksums and not found.problems else ""
    rows = [*_architecture(found.architecture)]
    rows += [("not convertible", found.convertible)] if found.convertible else []
    rows += [("parameters", _amount(found.tensors))] if found.tensors else []
    rows += [(name, _text(value)) for name, value in found.origin.items()]
    if found.kind in (KINDS["training"], KINDS["adapters"]):
        state = _amount(found.optimizer) if found.optimizer else "none"
        rows.append(("optimizer state", state))
    rows += [("problem", problem) for problem in found.problems]
    lines = [f"{found.path}: {found.kind}, {whole}{checked}"]
    lines += [f"  {name:<16} {text}" for name, text in rows]
    width = max((len(entry.name) for entry in found.tensors), default=0)
    if tensors:
        lines += [f"{e.name:<{width}}  {e.dtype:<8}  {list(e.shape)}" for e in found.tensors]
    return "\n".join(lines)


def _architecture(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    rope = f"theta {_text(spec.get('rope_theta'))}"
    if isinstance(scaling := spec.get("rope_scaling"), Mapping):
        rest = {name: value for name, value in scaling.items() if name != "rope_type"}
        rope += f", {scaling.get('rope_type')} scaling ({_text(rest)})"
    rows = [
        ("family", f"{spec['family']}"),
        ("layers", f"{spec['num_layers']}"),
        ("hidden size", f"{spec['hidden_size']}, MLP {spec['ffn_hidden_size']}"),
        (
            "heads",
            f"{spec['num_attention_heads']} of {spec['head_dim']}, "
            f"{spec['num_query_groups']} of keys and values",
        ),
        ("vocabulary", f"{spec['vocab_size']}" + ", tied" * bool(spec["tied_embeddings"])),
        ("positions", f"{spec['max_position_embeddings']}, {rope}"),
    ]
    if experts := spec.get("experts"):
        rows.append(("experts", f"{experts}, {spec.get('experts_per_token')} of a token"))
    return rows


def _amount(entries: Iterable[Entry]) -> str:
    total = _count(entries)
    return f"{total['count']:,} ({total['bytes']:,} bytes; {', '.join(total['dtypes'])})"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
