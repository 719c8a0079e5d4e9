"""Copies of a Hugging Face folder with something wrong, or unusual."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_deft.convert.stages import Facts
from megatron_deft.convert.tokens import make_batch

Spoil = Callable[[dict[str, Tensor]], None]


def spoiled(source: Path, out: Path, spoil: Spoil) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    spoil(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def reconfigured(source: Path, out: Path, **fields: Any) -> Path:
    shutil.copytree(source, out)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **fields}))
    return out


def swap_two_heads(tensors: dict[str, Tensor]) -> None:
    """Query heads 1 and 2 of layer 2, weight and bias: they belong to different groups."""
    for kind in ("weight", "bias"):
        q = tensors[f"model.layers.2.self_attn.q_proj.{kind}"]
        q[8:24] = torch.cat([q[16:24], q[8:16]])


def massive(tensors: dict[str, Tensor]) -> None:
    """One channel, of every token."""
    tensors["model.embed_tokens.weight"][:, 0] = 1e4


def one_massive_token(tensors: dict[str, Tensor]) -> None:
    """One channel, of the first token of the first row."""
    ids = make_batch([], Facts(4, 32, len(tensors["model.embed_tokens.weight"]), 128), None).ids
    tensors["model.embed_tokens.weight"][ids[0, 0], 0] = 1e5
