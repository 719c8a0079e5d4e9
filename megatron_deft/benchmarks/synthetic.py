"""Llama-shaped Hugging Face folders of any size, their weights random and known in advance."""

from __future__ import annotations

import zlib
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_deft.convert import hf_folder, mapping
from megatron_deft.convert.hf_folder import Piece, Weights
from megatron_deft.convert.streams import progress_bar
from megatron_deft.models.families import ModelSpec, spec_from_hf

DTYPE = torch.bfloat16
BLOCK = 2**24  # random values; every tensor repeats them from a place of its own
SCALE = 0.02  # their standard deviation

_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3", **_LLAMA3, "original_max_position_embeddings": 8192
    },
    "torch_dtype": "bfloat16",
}  # fmt: skip


def _shape(
    hidden: int, ffn: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return _COMMON | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


# 1b and 8b are shaped as Llama 3.2 1B and Llama 3.1 8B; tiny is many times its largest tensor.
CONFIGS = {
    "tiny": _shape(1024, 4096, 8, 16, 4, 8000, False),
    "1b": _shape(2048, 8192, 16, 32, 8, 128256, True),
    "8b": _shape(4096, 14336, 32, 32, 8, 128256, False),
}


def spec(shape: str) -> ModelSpec:
    """The model of a key of CONFIGS."""
    return spec_from_hf(CONFIGS[shape])


def shapes(shape: str) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model."""
    return {name: s for p in mapping.parameters(spec(shape)) for name, s in p.hf.items()}


def model_bytes(shape: str) -> int:
    """Bytes of all tensors."""
    return sum(map(prod, shapes(shape).values())) * DTYPE.itemsize


def largest_bytes(shape: str) -> int:
    """Bytes of the largest tensor that either side stores; Megatron joins some of them."""
    parameters = mapping.parameters(spec(shape))
    return max(sum(map(prod, p.hf.values())) for p in parameters) * DTYPE.itemsize


def random_block() -> Tensor:
    """What the tensors repeat, [2 * BLOCK]: twice the same, so that each may start anywhere."""
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(BLOCK, generator=generator) * SCALE).to(DTYPE)
    return torch.cat([block, block])


def tensor(name: str, shape: tuple[int, ...], block: Tensor) -> Tensor:
    """The tensor `name` of every synthetic model, bf16."""
    flat = torch.empty(prod(shape), dtype=DTYPE)
    start = zlib.crc32(name.encode()) % BLOCK
    for place in range(0, len(flat), BLOCK):
        part = flat[place : place + BLOCK]
        part.copy_(block[start : start + len(part)])
    return flat.reshape(shape)


def make(folder: Path, shape: str) -> None:
    """Write the new `folder`: config.json and shards whose tensors stand in order of their names.

    That is how safetensors itself writes a file, and not the order in which Megatron wants them.
    """
    folder.mkdir()
    block = random_block()

    def load(name: str, size: tuple[int, ...]) -> dict[str, Tensor]:
        return {name: tensor(name, size, block)}

    pieces = [
        Piece({name: size}, DTYPE, partial(load, name, size))
        for name, size in sorted(shapes(shape).items())
    ]
    with progress_bar("make", model_bytes(shape)) as bar:
        hf_folder.write_weights(folder, pieces, hf_folder.SHARD_BYTES, bar)
    hf_folder.write_json(folder / "config.json", CONFIGS[shape])


def different(folder: Path, shape: str) -> list[str]:
    """The tensors of the model that `folder` lacks or holds other bits of, and those it adds."""
    weights, block, wanted = Weights(folder), random_block(), shapes(shape)
    wrong = set(wanted) ^ set(weights.tensors)
    for name in set(wanted) - wrong:
        if not torch.equal(weights.load(name), tensor(name, wanted[name], block)):
            wrong.add(name)
    return sorted(wrong)
