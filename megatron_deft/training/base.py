"""What a run starts from: weights of ours (model.load) or a Hugging Face folder (model.hf)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_deft import checkpoint_folder
from megatron_deft.config import ModelConfig
from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec


@dataclass(frozen=True)
class Base:
    """A model before the run's first step.

    key:     the configuration's: "model.load=PATH" or "model.hf=PATH"
    spec:    its architecture
    name:    what the model card calls it; None when unknown
    license: the metadata of the model card that say under which licence it is
    folder:  with the weights
    files:   folder with config.json and the tokenizer
    load:    fills the GPTModel chunks of this rank; every rank calls it. Returns how many heads of
             multi-token prediction the model has; further ones of the chunks stay as they are
    """

    key: str
    spec: ModelSpec
    name: str | None
    license: Mapping[str, Any] | None
    folder: Path
    files: Path
    load: Callable[[Sequence[Any]], int]


def read_base(model: ModelConfig) -> Base:
    """The model that the configuration names, its headers read and its tensors accounted for.

    Errors: UserError naming the key and what is wrong with what it names.
    """
    return _weights(model.load) if model.load is not None else _hugging_face(str(model.hf))


def _weights(load: str) -> Base:
    path, key = Path(load), f"model.load={load}"
    converted = (path / checkpoint_folder.MANIFEST).exists()
    if not path.exists() or (not converted and (path / "config.json").exists()):
        what = "is a Hugging Face folder" if path.exists() else "does not exist"
        raise UserError(
            f"{key} {what}: set model.hf={load}, or run `megatron-deft convert import {load} "
            "WEIGHTS` and set model.load=WEIGHTS"
        )
    folder = checkpoint_folder.resolve(path)
    manifest = checkpoint_folder.read_manifest(folder)
    if manifest.get("adapter"):
        raise UserError(
            f"{key} holds adapters, no whole model: go on training them with "
            f"train.resume={folder}, or merge them (`megatron-deft convert export "
            f"{folder} HF`) and set model.hf=HF"
        )
    spec = ModelSpec.from_json(manifest["spec"])
    name, licence = manifest.get("base"), manifest.get("license")
    fill = partial(_load_weights, folder)
    return Base(key, spec, name, licence, folder, folder / "hf", fill)


def _load_weights(folder: Path, chunks: Sequence[Any]) -> int:
    from megatron_deft.convert.state import load_model
    from megatron_deft.training import checkpointing

    checkpointing.check(folder, "model.load")
    return load_model(chunks, folder / "state")


def _hugging_face(hf: str) -> Base:
    from megatron_deft.convert import hf_folder
    from megatron_deft.convert.card import read_license
    from megatron_deft.convert.sources import HFSource

    if (Path(hf) / checkpoint_folder.MANIFEST).exists():
        raise UserError(f"model.hf={hf} is no Hugging Face folder but one of ours: set model.load")
    folder = hf_folder.find(hf)
    source = HFSource(folder)
    name = hf_folder.base_name(folder, source.config)
    licence = read_license(folder)
    load = partial(_load_hf, source)
    return Base(f"model.hf={hf}", source.spec, name, licence, folder, folder, load)


def _load_hf(source: Any, chunks: Sequence[Any]) -> int:
    import torch.distributed as dist

    from megatron_deft.convert.direct import load_hf

    load_hf(chunks, source, progress=dist.get_rank() == 0)
    return 0
