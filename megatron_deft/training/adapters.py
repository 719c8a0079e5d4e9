"""Adapters in a run: what its checkpoints say of them, and whether one can be gone on from."""

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_deft import checkpoint_folder
from megatron_deft.config import RunConfig
from megatron_deft.convert.adapters import fingerprint, numbers, weight_files
from megatron_deft.errors import UserError
from megatron_deft.models.adapters import Adapters
from megatron_deft.models.families import ModelSpec
from megatron_deft.training.base import Base

FIXED = ("rank", "targets")  # what the adapters' shapes follow from


def adapters_of(cfg: RunConfig) -> Adapters | None:
    """The adapters that are trained; None: every weight is."""
    lora = cfg.lora
    if lora.rank is None:
        return None
    return Adapters(lora.rank, lora.alpha_used, lora.rslora, lora.dropout, lora.targets)


def record(cfg: RunConfig, base: Base) -> dict[str, Any] | None:
    """The manifest's entry: the adapters, and which base they are of; None without any.

    Every rank calls it, and reads its share of the base's weights for their checksums.
    """
    adapters = adapters_of(cfg)
    if adapters is None:
        return None
    names = weight_files(base.folder)
    found: list[Any] = [None] * dist.get_world_size()
    mine = names[dist.get_rank() :: dist.get_world_size()]
    dist.all_gather_object(found, checkpoint_folder.hash_files(base.folder, mine))
    files = {name: entry for part in found for name, entry in part.items()}
    where = {"path": os.path.abspath(base.folder), "weights_xxh3_128": fingerprint(files)}
    return {**adapters.to_json(), "base": where}


def check_resume(folder: Path, now: dict[str, Any] | None, key: str) -> list[str]:
    """Whether a run with the adapters `now` can go on from the checkpoint `folder`.

    key:     the configuration's name of the base
    returns: notes for the log
    Errors:  UserError naming what differs.
    """
    saved = checkpoint_folder.read_manifest(folder).get("adapter")
    if saved is None and now is None:
        return []
    if saved is None:
        raise UserError(
            f"lora.rank={now and now['rank']}, but {folder} was trained without adapters: set it "
            f"to null, or start adapters on its weights with model.load={folder} in a new run_dir"
        )
    if now is None:
        raise UserError(
            f"lora.rank=null, but {folder} holds adapters: set lora.rank={saved['rank']}, or train "
            f"every weight from what `megatron-deft convert export {folder} HF` merges"
        )
    for name in FIXED:
        if saved[name] != now[name]:
            raise UserError(
                f"lora.{name}={_spell(now[name])}, but {folder} was saved with "
                f"{_spell(saved[name])}: set it so, or start anew in another run_dir"
            )
    if saved["base"]["weights_xxh3_128"] != now["base"]["weights_xxh3_128"]:
        raise UserError(
            f"{key} has other weights than the base of {folder}, which was "
            f"{saved['base']['path']}: name that one, as it was"
        )
    return [
        f"lora.{name} is {now[name]} now and was {saved[name]}"
        for name in ("alpha", "rslora", "dropout")
        if saved[name] != now[name]
    ]


def _spell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def trained_numbers(cfg: RunConfig, spec: ModelSpec) -> str:
    """`trains 1.2M of 1.2B parameters (0.1%)`, heads of multi-token prediction among them."""
    adapters = adapters_of(cfg)
    trained, base = numbers(spec, adapters, cfg.model.mtp_layers)
    share = f" ({trained / base:.2%}): adapters of rank {adapters.rank}" if adapters else ""
    return f"trains {_short(trained)} of {_short(base)} parameters{share}"


def _short(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)
