"""Heads of multi-token prediction: each predicts one token further (DeepSeek-V3, arXiv 2412.19437).

Head k is a layer like the model's last, behind a projection of the hidden states of head k - 1 and
the embedding of the token k places on; embedding and output layer are the model's own. All heads
are on the last pipeline stage, together with a copy of the embedding, as megatron-core has it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
    get_mtp_num_layers_to_build,
    roll_tensor,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from megatron_deft.models.families import ModelSpec
from megatron_deft.models.packed import PackedParams
from megatron_deft.models.spec import layer_spec, parts

PREFIX = "mtp.layers."  # of a head's parameters, its number from 0 next


def head_spec(
    tcfg: TransformerConfig, spec: ModelSpec, vp_stage: int | None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The heads that this chunk holds, of the parts that layers are made of; None: none.

    megatron-core's own spec was rejected: without TransformerEngine its norm refuses sequence
    parallelism, and it takes the layer from the stage's own, of which there may be none.
    """
    if not get_mtp_num_layers_to_build(tcfg, vp_stage=vp_stage):
        return None
    use = parts()
    layer = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=use.norm,
            hnorm=use.norm,
            eh_proj=use.column_linear,
            transformer_layer=layer_spec(tcfg, spec, spec.num_layers - 1 in spec.expert_layers),
            layer_norm=use.norm,
        ),
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * tcfg.mtp_num_layers)


def count_heads(names: Iterable[str]) -> int:
    """How many heads a model, or a checkpoint, with parameters of these names has."""
    return len({name.split(".")[2] for name in names if name.startswith(PREFIX)})


def is_of_head(name: str, first: int) -> bool:
    """Whether the parameter belongs to a head from number `first` (counted from 0) on."""
    return name.startswith(PREFIX) and int(name.split(".")[2]) >= first


def chunk_state(chunk: Any) -> dict[str, Any]:
    """A chunk's sharded_state_dict; megatron-core forgets a group where heads have a stage."""
    state: dict[str, Any] = chunk.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None))
    return state


def rolled(weights: Tensor, heads: int, packed: PackedParams | None) -> Iterator[Tensor]:
    """Weights [b, s] of labels -> those of each head's labels, which lie one further each time."""
    group = parallel_state.get_context_parallel_group()
    for _ in range(heads):
        weights, _ = roll_tensor(weights, cp_group=group, packed_seq_params=packed)
        yield weights


@torch.no_grad()
def initialize_heads(chunks: Sequence[GPTModel], seed: int, first: int = 0) -> None:
    """Draw the matrices of the heads from number `first` on anew; norms and biases stay.

    Each is drawn whole from a generator of its own, and this rank takes its part: every layout
    begins with the same heads. Normal, as megatron-core does it.
    """
    for chunk in chunks:
        state = {key: value for key, value in chunk_state(chunk).items() if is_of_head(key, first)}
        apply_factories(state)
        for part in nested_values(state):
            if isinstance(part, ShardedTensor) and part.data.ndim > 1:
                _draw(part, chunk.config, seed)


def _draw(part: ShardedTensor, config: TransformerConfig, seed: int) -> None:
    stack = part.prepend_axis_num  # of experts
    name = f"{seed} {part.key} {tuple(part.global_offset[:stack])}"
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    is_output = part.key.endswith(("linear_proj.weight", "linear_fc2.weight"))
    draw: Any = config.output_layer_init_method if is_output else config.init_method
    whole = draw(torch.empty(part.global_shape[stack:]), generator=generator)
    for dim, start in enumerate(part.global_offset[stack:]):
        whole = whole.narrow(dim, start, part.data.shape[dim])
    part.data.copy_(whole)
