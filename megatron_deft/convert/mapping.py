"""Which Hugging Face tensors make which Megatron parameter: one table per family, as data.

A row names a Megatron parameter (local-spec spelling, layers numbered over the whole model), the
Hugging Face tensors it is made of with their axes, the transform between them, and the ModelSpec
flag that decides whether the parameter exists. A new dense family is one more table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec


class Row(NamedTuple):
    """One line of a family's table; `{i}` stands for the layer, see AXES for the letters."""

    megatron: str
    transform: str
    hf: tuple[tuple[str, str], ...]  # (tensor name, axes) in the order the transform takes them
    when: str = "always"


LLAMA = (
    Row("embedding.word_embeddings.weight", "vocab", (("model.embed_tokens.weight", "v h"),)),
    Row(
        "decoder.layers.{i}.input_layernorm.weight",
        "copy",
        (("model.layers.{i}.input_layernorm.weight", "h"),),
    ),
    Row(
        "decoder.layers.{i}.self_attention.linear_qkv.weight",
        "qkv",
        (
            ("model.layers.{i}.self_attn.q_proj.weight", "q h"),
            ("model.layers.{i}.self_attn.k_proj.weight", "k h"),
            ("model.layers.{i}.self_attn.v_proj.weight", "k h"),
        ),
    ),
    Row(
        "decoder.layers.{i}.self_attention.linear_qkv.bias",
        "qkv",
        (
            ("model.layers.{i}.self_attn.q_proj.bias", "q"),
            ("model.layers.{i}.self_attn.k_proj.bias", "k"),
            ("model.layers.{i}.self_attn.v_proj.bias", "k"),
        ),
        "qkv_bias",
    ),
    Row(
        "decoder.layers.{i}.self_attention.linear_proj.weight",
        "copy",
        (("model.layers.{i}.self_attn.o_proj.weight", "h q"),),
    ),
    Row(
        "decoder.layers.{i}.self_attention.linear_proj.bias",
        "copy",
        (("model.layers.{i}.self_attn.o_proj.bias", "h"),),
        "attention_out_bias",
    ),
    Row(
        "decoder.layers.{i}.pre_mlp_layernorm.weight",
        "copy",
        (("model.layers.{i}.post_attention_layernorm.weight", "h"),),
    ),
    Row(
        "decoder.layers.{i}.mlp.linear_fc1.weight",
        "gate_up",
        (
            ("model.layers.{i}.mlp.gate_proj.weight", "f h"),
            ("model.layers.{i}.mlp.up_proj.weight", "f h"),
        ),
    ),
    Row(
        "decoder.layers.{i}.mlp.linear_fc1.bias",
        "gate_up",
        (
            ("model.layers.{i}.mlp.gate_proj.bias", "f"),
            ("model.layers.{i}.mlp.up_proj.bias", "f"),
        ),
        "mlp_bias",
    ),
    Row(
        "decoder.layers.{i}.mlp.linear_fc2.weight",
        "copy",
        (("model.layers.{i}.mlp.down_proj.weight", "h f"),),
    ),
    Row(
        "decoder.layers.{i}.mlp.linear_fc2.bias",
        "copy",
        (("model.layers.{i}.mlp.down_proj.bias", "h"),),
        "mlp_bias",
    ),
    Row("decoder.final_layernorm.weight", "copy", (("model.norm.weight", "h"),)),
    Row("output_layer.weight", "vocab", (("lm_head.weight", "v h"),), "untied"),
)

# Mistral and Qwen2 name their tensors as Llama does; what differs (biases, head_dim, tied
# embeddings) is in the ModelSpec.
FAMILIES: dict[str, tuple[Row, ...]] = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA}

CONDITIONS: dict[str, Callable[[ModelSpec], bool]] = {
    "always": lambda spec: True,
    "untied": lambda spec: not spec.tied_embeddings,
    "qkv_bias": lambda spec: spec.qkv_bias,
    "attention_out_bias": lambda spec: spec.attention_out_bias,
    "mlp_bias": lambda spec: spec.mlp_bias,
}

AXES: dict[str, Callable[[ModelSpec], int]] = {
    "v": lambda spec: spec.vocab_size,
    "h": lambda spec: spec.hidden_size,
    "f": lambda spec: spec.ffn_hidden_size,
    "q": lambda spec: spec.num_attention_heads * spec.head_dim,
    "k": lambda spec: spec.num_query_groups * spec.head_dim,
}

# A tied model stores lm_head only by accident; it must then equal its embedding.
TIED_COPY = ("lm_head.weight", "model.embed_tokens.weight")
# Buffers that old transformers versions saved and that follow from the config.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)

# dist_checkpointing stores the norms under TransformerEngine's fused names (local spec:
# sharded_state_dict_keys_map in megatron/core/models/gpt/gpt_layer_specs.py).
CHECKPOINT_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
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


class Transform(NamedTuple):
    """`join`: Hugging Face tensors to the Megatron one; `split`: its exact inverse."""

    join: Callable[[Sequence[Tensor], ModelSpec], Tensor]
    split: Callable[[Tensor, ModelSpec], tuple[Tensor, ...]]


_COPY = Transform(lambda tensors, spec: tensors[0], lambda tensor, spec: (tensor,))

TRANSFORMS: dict[str, Transform] = {
    "copy": _COPY,
    # As copy, but the stored tensor may have padding rows after the vocabulary's own.
    "vocab": _COPY,
    "qkv": Transform(_join_qkv, _split_qkv),
    "gate_up": Transform(
        lambda tensors, spec: torch.cat(tuple(tensors)), lambda tensor, spec: tensor.chunk(2)
    ),
}


@dataclass(frozen=True, eq=False)
class Parameter:
    """One Megatron parameter of one model: a row with the layer and the sizes filled in."""

    megatron: str
    transform: str
    hf: dict[str, tuple[int, ...]]  # name -> shape, in the order the transform takes them
    layer: int | None  # index over the whole model; None outside the layers

    @property
    def padded(self) -> bool:
        """Whether the stored tensor may have more rows than the Hugging Face one."""
        return self.transform == "vocab"


class Slot(NamedTuple):
    """Where a parameter lies in a checkpoint: a part of the stored tensor `key`."""

    key: str
    size: tuple[int, ...]  # of the whole stored tensor, without vocabulary padding
    offsets: tuple[int, ...]
    shape: tuple[int, ...]  # of the part


def slots(parameter: Parameter, spec: ModelSpec) -> tuple[Slot, ...]:
    """Where it may lie, the place that import writes to first.

    Megatron stacks the layers under one key, [layers, ...], or gives each layer a key of its own.
    """
    shape, name = megatron_shape(parameter, spec), parameter.megatron
    start = (0,) * len(shape)
    if parameter.layer is None:
        return (Slot(name, shape, start, shape),)
    name = name.removeprefix(f"{LAYERS}{parameter.layer}.")
    name = CHECKPOINT_NAMES.get(name, name)
    stacked = (spec.num_layers, *shape)
    return (
        Slot(f"{LAYERS}{name}", stacked, (parameter.layer, *start), (1, *shape)),
        Slot(f"{LAYERS}{parameter.layer}.{name}", shape, start, shape),
    )


def parameters(spec: ModelSpec) -> list[Parameter]:
    """Every parameter of the model, embedding first, layer by layer, output last."""
    if spec.family not in FAMILIES:
        raise UserError(
            f"model family {spec.family!r} has no conversion table: legal are "
            f"{', '.join(FAMILIES)}; a new one is a table in megatron_deft/convert/mapping.py"
        )
    rows = (row for row in FAMILIES[spec.family] if CONDITIONS[row.when](spec))
    found: list[Parameter] = []
    for per_layer, block in groupby(rows, key=lambda row: "{i}" in row.megatron):
        block_rows = tuple(block)
        for layer in range(spec.num_layers) if per_layer else (None,):
            found.extend(_parameter(row, spec, layer) for row in block_rows)
    return found


def _parameter(row: Row, spec: ModelSpec, layer: int | None) -> Parameter:
    hf = {
        name.format(i=layer): tuple(AXES[axis](spec) for axis in axes.split())
        for name, axes in row.hf
    }
    return Parameter(row.megatron.format(i=layer), row.transform, hf, layer)


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
