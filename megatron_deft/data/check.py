"""What can be said of a run's data before anything is started: quickly, without a tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_deft.data.manifest import MANIFEST, read_manifest
from megatron_deft.data.rows import detect_format
from megatron_deft.errors import UserError

if TYPE_CHECKING:
    from megatron_deft.config import DataConfig


def check_data(cfg: "DataConfig") -> None:
    """Look at the manifests of sets and the columns of files.

    Errors: UserError for what is missing, of mixed kinds, or does not go with the other keys.
    """
    for key in ("train_sets", "val_sets"):
        if sets := getattr(cfg, key):
            check_sets(cfg, key, sets)
    for files in (cfg.train_files, cfg.val_files):
        if files:
            detect_format(cfg, files)


def check_sets(cfg: "DataConfig", key: str, sets: Sequence[str]) -> str:
    """The kind of the sets that data.KEY names, "sft" or "pretrain". Errors: see check_data."""
    kinds = {one: _kind(one) for one in sets}
    if len(set(kinds.values())) > 1:
        shown = ", ".join(f"{one} ({kind})" for one, kind in kinds.items())
        raise UserError(f"data.{key}: samples and running text do not mix: {shown}")
    kind = kinds[sets[0]]
    if kind == "sft" and cfg.split is not None and key == "train_sets":
        raise UserError(
            "data.split is for pretraining, and data.train_sets holds samples: name data.val_sets"
        )
    if kind == "pretrain" and cfg.pack:
        raise UserError("data.pack is for samples; rows of running text are always full")
    for one in sets if kind == "sft" else ():
        longest = read_manifest(one)["longest"]
        if longest > cfg.max_length:
            raise UserError(
                f"{one}: its longest sample has {longest} tokens, data.max_length is "
                f"{cfg.max_length}: raise it, or prepare the set again with "
                f"--max-length {cfg.max_length}"
            )
    return kind


def _kind(path: str) -> str:
    """Of a set by its manifest; what stands before .bin and .idx is running text."""
    if (Path(path) / MANIFEST).exists() or Path(path).is_dir():
        return str(read_manifest(path)["kind"])
    for ending in (".bin", ".idx"):
        if not Path(path + ending).is_file():
            raise UserError(
                f"{path}{ending}: no such file: name a folder of `megatron-deft prepare`, or what "
                "stands before .bin and .idx of an indexed dataset"
            )
    return "pretrain"
