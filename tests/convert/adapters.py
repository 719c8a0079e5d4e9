"""Adapter checkpoints with random adapters, and by hand what they make of their base."""

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert import hf_folder
from megatron_deft.convert.adapters import fingerprint, weight_files
from megatron_deft.convert.mapping import Slot
from megatron_deft.convert.state import Chunk, write_state
from megatron_deft.convert.streams import progress_bar
from megatron_deft.models.adapters import TARGETS, Adapters
from megatron_deft.models.families import ModelSpec, spec_from_hf
from tests.convert.tiny_models import tensors

ADAPTERS = Adapters(rank=3, alpha=5.0, rslora=True, dropout=0.0, targets=TARGETS)
# a fused matrix's parts by their Hugging Face names, in the order of this dict
FUSED = {
    "q_proj": "linear_qkv", "k_proj": "linear_qkv", "v_proj": "linear_qkv",
    "qkv_proj": "linear_qkv", "o_proj": "linear_proj", "gate_proj": "linear_fc1",
    "up_proj": "linear_fc1", "gate_up_proj": "linear_fc1", "down_proj": "linear_fc2",
}  # fmt: skip


class Made(NamedTuple):
    """A base, a checkpoint of adapters on it, and of each Hugging Face module A and B in fp32."""

    base: Path
    checkpoint: Path
    pairs: dict[str, tuple[Tensor, Tensor]]

    def merged(self) -> dict[str, Tensor]:
        """Every tensor in float64: W + 5 / sqrt(3) * B A."""
        found = {name: tensor.double() for name, tensor in tensors(self.base).items()}
        for module, (a, b) in self.pairs.items():
            found[f"{module}.weight"] += 5.0 / 3.0**0.5 * b.double() @ a.double()
        return found


def make_adapters(
    base: Path,
    root: Path,
    dtype: torch.dtype = torch.float32,
    weights: Path | None = None,
    name: str = "owner/base",
) -> Made:
    """Adapters on every linear layer of the Hugging Face folder `base`, or of it as `weights`."""
    config = hf_folder.read_json(base / "config.json", "config")
    spec = spec_from_hf(config)
    pairs, state = _draw(base, spec, dtype)
    checkpoint = root / "adapters"
    hf_folder.copy_companions(base, checkpoint / "hf")
    total = sum(tensor.nbytes for tensor in state.values())
    chunks = [
        Chunk(Slot(key, t.shape, (0,) * t.ndim, t.shape), dtype, t.clone)
        for key, t in state.items()
    ]
    with progress_bar("write", total, False) as bar:
        write_state(checkpoint / "state", chunks, bar)
    named = weights or base
    checksum = fingerprint(folders.hash_files(named, weight_files(named)))
    entry = {"path": os.path.abspath(named), "weights_xxh3_128": checksum}
    folders.write_manifest(
        checkpoint,
        kind="training",
        spec=spec.to_json(),
        step=1,
        base=name,
        adapter={**ADAPTERS.to_json(), "base": entry},
    )
    return Made(base, checkpoint, pairs)


def _draw(
    base: Path, spec: ModelSpec, dtype: torch.dtype
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 4).to(dtype)

    groups: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    shapes = {name.removesuffix(".weight"): t.shape for name, t in tensors(base).items()}
    for module in shapes:
        parent, _, last = module.rpartition(".")
        if last in FUSED:
            groups[parent, FUSED[last]][last] = module
    pairs, state = {}, {}
    experts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for (parent, fused), modules in groups.items():
        a = draw(ADAPTERS.rank, shapes[next(iter(modules.values()))][1])
        parts = {last: draw(shapes[m][0], ADAPTERS.rank) for last, m in modules.items()}
        for last, module in modules.items():
            pairs[module] = a.float(), parts[last].float()
        layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", parent).groups()  # type: ignore[union-attr]
        place = f"decoder.layers.{layer}.{rest}".replace("self_attn", "self_attention")
        expert = re.search(r"\.experts\.(\d+)", place) or re.search(
            r"block_sparse_moe\.experts\.(\d+)", place
        )
        for suffix, tensor in ((".lora_a", a), (".lora_b", _joined(fused, parts, spec))):
            if expert is None:
                state[f"{place}.{fused}{suffix}"] = tensor
            else:
                key = place.replace(expert[0], ".experts.experts")
                experts[f"{key}.{fused}{suffix}"][int(expert[1])] = tensor
    state |= {key: torch.stack([own[e] for e in sorted(own)]) for key, own in experts.items()}
    if not spec.uniform_layers:
        return pairs, state
    # as megatron-core saves layers that are all alike
    layers = [f"decoder.layers.{i}." for i in range(spec.num_layers)]
    names = [key.removeprefix(layers[0]) for key in state if key.startswith(layers[0])]
    return pairs, {
        f"decoder.layers.{name}": torch.stack([state[layer + name] for layer in layers])
        for name in names
    }


def _joined(fused: str, parts: dict[str, Tensor], spec: ModelSpec) -> Tensor:
    """B of megatron's matrix: of each group its queries' rows, its key's, its value's."""
    if fused != "linear_qkv":
        names = [name for name in FUSED if name in parts]
        return torch.cat([parts[name] for name in names])
    heads, groups, size = spec.num_attention_heads, spec.num_query_groups, spec.head_dim
    if "qkv_proj" in parts:
        sizes = [heads * size, groups * size, groups * size]
        q, k, v = parts["qkv_proj"].split(sizes)
    else:
        q, k, v = (parts[name] for name in ("q_proj", "k_proj", "v_proj"))
    rows, per_group = [], heads // groups * size
    for g in range(groups):
        rows.append(q[g * per_group : (g + 1) * per_group])
        rows.append(k[g * size : (g + 1) * size])
        rows.append(v[g * size : (g + 1) * size])
    return torch.cat(rows)
