"""Parameters of one model on both sides: names, shapes, transforms and places in a checkpoint.

Which Hugging Face tensors make which Megatron parameter is declared family by family, in
megatron_deft/models/families; here the rows are filled in for one ModelSpec.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_deft.errors import UserError
from megatron_deft.models.families import FAMILIES, ModelSpec
from megatron_deft.models.families.table import AXES, Row

# A tied model stores lm_head only by accident; it must then equal its embedding.
TIED_COPY = ("lm_head.weight", "model.embed_tokens.weight")
# Buffers that old transformers versions saved and that follow from the config.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)

PRE_MLP_NORM = "pre_mlp_layernorm.weight"  # kept before experts, which fuse no norm
# dist_checkpointing stores the norms under TransformerEngine's fused names (local spec:
# sharded_state_dict_keys_map in megatron/core/models/gpt/gpt_layer_specs.py).
CHECKPOINT_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    PRE_MLP_NORM: "mlp.linear_fc1.layer_norm_weight",
}
LAYERS = "decoder.layers."


def _join_qkv(tensors: Sequence[Tensor], spec: ModelSpec) -> Tensor:
    """q [heads*d, ...], k and v [groups*d, ...] -> [(heads + 2*groups)*d, ...], group by group.

    Megatron keeps "q1 q2 k1 v1 | q3 q4 k2 v2 | ..." so that a slice of whole groups is a
    tensor-parallel shard (get_query_key_value_tensors in megatron/core/transformer/attention.py).
    """
    rest = tensors[0].shape[1:]
    grouped = [t.reshape(spec.num_query_groups, -1, *rest) for t in tensors]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def _split_qkv(tensor: Tensor, spec: ModelSpec) -> tuple[Tensor, ...]:
    rest, groups = tensor.shape[1:], spec.num_query_groups
    sizes = [spec.num_attention_heads // groups * spec.head_dim, spec.head_dim, spec.head_dim]
    parts = tensor.reshape(groups, sum(sizes), *rest).split(sizes, dim=1)
    return tuple(part.reshape(-1, *rest) for part in parts)


def _packed_sizes(spec: ModelSpec) -> list[int]:
    heads, groups = spec.num_attention_heads, spec.num_query_groups
    return [heads * spec.head_dim, groups * spec.head_dim, groups * spec.head_dim]


class Transform(NamedTuple):
    """`join`: Hugging Face tensors to the Megatron one; `split`: its exact inverse."""

    join: Callable[[Sequence[Tensor], ModelSpec], Tensor]
    split: Callable[[Tensor, ModelSpec], tuple[Tensor, ...]]


TRANSFORMS: dict[str, Transform] = {
    "copy": Transform(lambda tensors, spec: tensors[0], lambda tensor, spec: (tensor,)),
    "qkv": Transform(_join_qkv, _split_qkv),
    "packed_qkv": Transform(
        lambda tensors, spec: _join_qkv(tensors[0].split(_packed_sizes(spec)), spec),
        lambda tensor, spec: (torch.cat(_split_qkv(tensor, spec)),),
    ),
    "gate_up": Transform(
        lambda tensors, spec: torch.cat(tuple(tensors)), lambda tensor, spec: tensor.chunk(2)
    ),
}


@dataclass(frozen=True, eq=False)
class Parameter:
    """One Megatron parameter of one model: a row with the layer and the sizes filled in."""

    megatron: str
    transform: str
    shard: str  # one of families.table.SHARDS
    hf: dict[str, tuple[int, ...]]  # name -> shape, in the order the transform takes them
    layer: int | None = None  # index over the whole model; None outside the layers
    expert: int | None = None  # index over the whole layer

    @property
    def padded(self) -> bool:
        """Whether the stored tensor may have more rows than the Hugging Face one."""
        return self.shard == "vocab"


class Slot(NamedTuple):
    """Where a parameter lies in a checkpoint: a part of the stored tensor `key`."""

    key: str
    size: tuple[int, ...]  # of the whole stored tensor, without vocabulary padding
    offsets: tuple[int, ...]
    shape: tuple[int, ...]  # of the part


def slots(parameter: Parameter, spec: ModelSpec) -> tuple[Slot, ...]:
    """Where it may lie, the place that import writes to first.

    Megatron stacks the experts of a layer under one key, [experts, ...]; it stacks the layers too,
    [layers, ...], where all of them are alike, or gives each layer a key of its own.
    """
    shape, name = megatron_shape(parameter, spec), parameter.megatron
    axes: list[tuple[int, int]] = []  # (size, offset) of the stacked axes
    if parameter.expert is not None:
        name = name.replace(f"local_experts.{parameter.expert}.", "experts.")
        axes = [(spec.experts, parameter.expert)]
    if parameter.layer is None:
        return (_slot(name, axes, shape),)
    name = name.removeprefix(f"{LAYERS}{parameter.layer}.")
    if name != PRE_MLP_NORM or parameter.layer not in spec.expert_layers:
        name = CHECKPOINT_NAMES.get(name, name)
    stacked = _slot(f"{LAYERS}{name}", [(spec.num_layers, parameter.layer), *axes], shape)
    own = _slot(f"{LAYERS}{parameter.layer}.{name}", axes, shape)
    return (stacked, own) if spec.uniform_layers else (own,)


def _slot(key: str, axes: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> Slot:
    sizes, offsets = (tuple(axis[i] for axis in axes) for i in (0, 1))
    return Slot(
        key, (*sizes, *shape), (*offsets, *(0 for _ in shape)), (*(1 for _ in axes), *shape)
    )


def parameters(spec: ModelSpec) -> list[Parameter]:
    """Every parameter of the model, embedding first, layer by layer, output last."""
    if spec.family not in FAMILIES:
        raise UserError(
            f"model family {spec.family!r} has no conversion table: legal are "
            f"{', '.join(sorted(FAMILIES))}; a new one is a file in megatron_deft/models/families"
        )
    rows = (row for row in FAMILIES[spec.family].rows if row.when(spec))
    found: list[Parameter] = []
    for per_layer, block in groupby(rows, key=lambda row: "{i}" in row.megatron):
        block_rows = tuple(block)
        for layer in range(spec.num_layers) if per_layer else (None,):
            found.extend(p for row in block_rows for p in _of_row(row, spec, layer))
    return found


def _of_row(row: Row, spec: ModelSpec, layer: int | None) -> Iterable[Parameter]:
    if layer is not None and layer not in tuple(row.layers(spec)):
        return
    for expert in range(spec.experts) if "{e}" in row.megatron else (None,):
        numbers = {"i": layer, "e": expert}
        hf = {
            name.format(**numbers): tuple(AXES[axis](spec) for axis in axes.split())
            for name, axes in row.hf
        }
        name = row.megatron.format(**numbers)
        yield Parameter(name, row.transform, row.shard, hf, layer, expert)


def join(parameter: Parameter, tensors: Sequence[Tensor], spec: ModelSpec) -> Tensor:
    """The Megatron tensor made of the Hugging Face `tensors`, given in `parameter.hf`'s order."""
    return TRANSFORMS[parameter.transform].join(tensors, spec)


def split(parameter: Parameter, tensor: Tensor, spec: ModelSpec) -> dict[str, Tensor]:
    """The Hugging Face tensors by name, contiguous; inverse of `join` to the last bit."""
    parts = TRANSFORMS[parameter.transform].split(tensor, spec)
    return {name: part.contiguous() for name, part in zip(parameter.hf, parts, strict=True)}


def megatron_shape(parameter: Parameter, spec: ModelSpec) -> tuple[int, ...]:
    """Shape of the whole Megatron parameter, without vocabulary padding."""
    parts = [torch.empty(shape, device="meta") for shape in parameter.hf.values()]
    return tuple(join(parameter, parts, spec).shape)
