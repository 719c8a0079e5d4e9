"""What a family's file declares: how its config.json reads, and which tensors make which parameter.

A row names a Megatron parameter (local-spec spelling, layers and experts numbered over the whole
model), the Hugging Face tensors it is made of with their axes, the transform between them
(convert/mapping.py), how tensor parallelism cuts it, and the layers that have it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_deft.models.families.modelspec import ModelSpec

Config = Mapping[str, Any]
Refusal = tuple[str, Callable[[Any], bool], str]  # (config key, is the value fine?, what is legal)


def every_layer(spec: ModelSpec) -> Iterable[int]:
    """All layers."""
    return range(spec.num_layers)


def mlp_layers(spec: ModelSpec) -> Iterable[int]:
    """The layers without experts."""
    return (i for i in range(spec.num_layers) if i not in spec.expert_layers)


def expert_layers(spec: ModelSpec) -> Iterable[int]:
    """The layers with experts."""
    return spec.expert_layers


def always(spec: ModelSpec) -> bool:
    """For rows that every model of the family has."""
    return True


class Row(NamedTuple):
    """One line of a family's table. In names, {i} stands for the layer and {e} for the expert.

    hf:     (tensor name, axes) in the order the transform takes them; letters of AXES
    shard:  what a tensor-parallel rank holds: "whole"; "rows" (axis 0 is cut), "columns" (axis 1),
            "halves" (axis 0 of gate and of up), "vocab" (rows of a vocabulary, which is padded)
    when:   whether a model has it
    layers: which layers have it, where the name has {i}
    """

    megatron: str
    hf: tuple[tuple[str, str], ...]
    transform: str = "copy"
    shard: str = "whole"
    when: Callable[[ModelSpec], bool] = always
    layers: Callable[[ModelSpec], Iterable[int]] = every_layer


SHARDS = ("whole", "rows", "columns", "halves", "vocab")

AXES: Mapping[str, Callable[[ModelSpec], int]] = {
    "v": lambda spec: spec.vocab_size,
    "h": lambda spec: spec.hidden_size,
    "f": lambda spec: spec.ffn_hidden_size,
    "2f": lambda spec: 2 * spec.ffn_hidden_size,
    "q": lambda spec: spec.num_attention_heads * spec.head_dim,
    "k": lambda spec: spec.num_query_groups * spec.head_dim,
    "qkk": lambda spec: (spec.num_attention_heads + 2 * spec.num_query_groups) * spec.head_dim,
    "d": lambda spec: spec.head_dim,
    "e": lambda spec: spec.experts,
    "m": lambda spec: spec.expert_ffn_hidden_size,
}


@dataclass(frozen=True)
class Family:
    """One model_type of transformers.

    fields:    ModelSpec fields that differ from reading.COMMON: a constant, or a function of the
               config in which absent keys have their defaults
    defaults:  what transformers assumes for an absent key, where it differs from reading.DEFAULTS
    refusals:  values that would be computed differently
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)
    defaults: Config = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
