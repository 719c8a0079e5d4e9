"""A Hugging Face folder straight into the ranks of a training run, without a folder in between.

megatron-core says of every parameter which part of which stored tensor it is (sharded_state_dict);
what `dist_checkpointing.load` would read of an imported state is here made of the Hugging Face
tensors. No rule of how a layout cuts a model is repeated, so any layout works, and the result is
that of `convert import` and `load_model` to the last bit.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megatron_deft.convert import mapping
from megatron_deft.convert.mapping import Parameter
from megatron_deft.convert.sources import HFSource
from megatron_deft.convert.streams import progress_bar
from megatron_deft.models.adapters import is_adapter


@torch.no_grad()
def load_hf(
    model: torch.nn.Module | Sequence[torch.nn.Module], source: HFSource, progress: bool = False
) -> None:
    """Fill this rank's GPTModel from `source`, in the model's dtype.

    Every rank calls it, with whatever parallel layout the process groups have; with a virtual
    pipeline, `model` is all of the rank's chunks. One whole parameter is in memory at a time. Rows
    of vocabulary padding become zero; heads of multi-token prediction stay as they are.
    `progress`: show a bar on a terminal.
    """
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    places = {
        (slot.key, slot.offsets): number
        for number, parameter in enumerate(source.parameters)
        for slot in mapping.slots(parameter, source.spec)
    }
    parts = [(places[_place(part)], part) for chunk in chunks for part in _parts(chunk)]
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    wanted = sum(tensor.numel() for name, tensor in named if _is_of_source(name))
    assert wanted == sum(part.data.numel() for _, part in parts)
    parts.sort(key=lambda pair: pair[0])  # the parts of one parameter follow each other
    with progress_bar("load", sum(part.data.nbytes for _, part in parts), progress) as bar:
        for number, group in groupby(parts, key=lambda pair: pair[0]):
            _fill(source, source.parameters[number], [part for _, part in group], bar)


def _parts(chunk: Any) -> list[Any]:
    """The ShardedTensors of a model; what megatron-core glues together (gate and up) is apart,
    and what the source does not have is left out."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_deft.models.heads import chunk_state

    state = {name: part for name, part in chunk_state(chunk).items() if _is_of_source(name)}
    apply_factories(state)
    return [part for part in nested_values(state) if isinstance(part, ShardedTensor)]


def _is_of_source(name: str) -> bool:
    from megatron_deft.models.heads import is_of_head

    return not is_adapter(name) and not is_of_head(name, 0)


def _place(part: Any) -> tuple[str, tuple[int, ...]]:
    """Key and offsets of the parameter that `part` is cut from: its stacked layer and expert."""
    stacked = tuple(part.global_offset[: part.prepend_axis_num])
    return part.key, stacked + (0,) * len(part.local_shape)


def _fill(source: HFSource, parameter: Parameter, parts: Sequence[Any], bar: Any) -> None:
    """A function of its own, so that nothing of a parameter outlives its turn."""
    whole = source.read(parameter, parts[0].dtype)
    for part in parts:
        wanted: Tensor = part.data.detach()
        offsets = part.global_offset[part.prepend_axis_num :]
        found = whole
        for dim, (start, length) in enumerate(zip(offsets, wanted.shape, strict=True)):
            left = max(0, min(length, whole.shape[dim] - start))
            assert left == length or (parameter.padded and dim == 0), (parameter, part)
            found = found.narrow(dim, min(start, whole.shape[dim]), left)
        wanted[: len(found)].copy_(found)
        wanted[len(found) :].zero_()
        bar.update(wanted.nbytes)
