"""Linear layers with low-rank adapters, exact in every layout.

A column-parallel layer has A on every tensor rank and B's rows beside the weight's rows; a
row-parallel one has A's columns beside the weight's columns and B on every rank. What ranks tell
each other is as narrow as the rank: [s, b, rank], never a second copy of the activations.
"""

import hashlib
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor

from megatron_deft.models.adapters import A, Adapters, B, is_adapter
from megatron_deft.platform import device


def adapted(linears: dict[str, Any], adapters: Adapters | None) -> dict[str, Any]:
    """The classes of linear layers by name, those that adapters are for replaced."""
    if adapters is None:
        return linears
    return {
        name: with_adapter(linear, adapters) if name in adapters.targets else linear
        for name, linear in linears.items()
    }


@cache
def with_adapter(linear: type, adapters: Adapters) -> type:
    """`linear`, megatron-core's column- or row-parallel one or TransformerEngine's, with lora_a
    [rank, in] and lora_b [out, rank] beside its weight.

    B is zero at first, so the first forward is the base's to the last bit.
    """

    class Adapted(linear):  # type: ignore[misc, valid-type]
        def __init__(self, input_size: int, output_size: int, *args: Any, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, *args, **kwargs)
            config, is_expert = kwargs["config"], kwargs.get("is_expert", False)
            self._group = get_tensor_model_parallel_group_if_none(
                kwargs.get("tp_group"), is_expert=is_expert
            )
            self._is_row = "input_is_parallel" in kwargs
            self._is_expert, self._sequence = is_expert, config.sequence_parallel
            self._stride = kwargs.get("stride", 1)  # 2: gate above up
            ranks = self._group.size()
            sizes = {A: (adapters.rank, input_size), B: (output_size, adapters.rank)}
            self._axes = {A: 1} if self._is_row else {B: 0}  # what is cut among the ranks
            for name, size in sizes.items():
                shape, axis = list(size), self._axes.get(name)
                if axis is not None:
                    shape[axis] //= ranks
                parameter = torch.nn.Parameter(
                    torch.zeros(shape, dtype=config.params_dtype, device=device())
                )
                if axis is None:
                    # Each rank makes the gradient of its part of the sequence;
                    # finalize_model_grads sums those so marked over the tensor ranks.
                    in_parts = self._sequence and not is_expert
                    parameter.sequence_parallel = in_parts  # type: ignore[attr-defined]
                    if is_expert and self._group.rank() == 0:
                        # Or the gradient norm would count it on the first tensor rank alone, and
                        # the others may have other experts.
                        set_tensor_model_parallel_attributes(parameter, True, 0, 1)
                else:
                    stride = self._stride if name == B else 1
                    set_tensor_model_parallel_attributes(parameter, True, axis, stride)
                # which ranks have the same: those that have the same weight
                is_whole = getattr(self.weight, "allreduce", True)
                parameter.allreduce = is_whole  # type: ignore[attr-defined]
                self.register_parameter(name, parameter)

        def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
            output, bias = super().forward(input_, *args, **kwargs)
            a, b = self._factors()
            narrow = self._among_ranks(F.linear(self._dropped(input_), a))
            return torch.add(output, F.linear(narrow, b), alpha=adapters.scale), bias

        def _factors(self) -> tuple[Tensor, Tensor]:
            if not self._is_expert:
                return self.lora_a, self.lora_b
            # The identity; backward, each rank of an expert gave the gradient of its channels. They
            # may be fewer than the tensor ranks, over which finalize_model_grads would sum.
            share = mappings.copy_to_tensor_model_parallel_region
            if self._is_row:
                return self.lora_a, share(self.lora_b, self._group)
            return share(self.lora_a, self._group), self.lora_b

        def _dropped(self, input_: Tensor) -> Tensor:
            if not adapters.dropout or not self.training:
                return input_
            if self._is_row and not self._sequence:
                # channels differ between tensor ranks, so must their dropout
                with tensor_parallel.get_cuda_rng_tracker().fork():
                    return F.dropout(input_, adapters.dropout)
            return F.dropout(input_, adapters.dropout)

        def _among_ranks(self, narrow: Tensor) -> Tensor:
            """A x of this rank's input -> what its part of the output is made of."""
            if self._is_expert:
                return narrow  # the dispatcher sums outputs, and gradients of inputs, over ranks
            if self._is_row and self._sequence:
                return mappings.reduce_scatter_to_sequence_parallel_region(narrow, self._group)
            if self._is_row:
                return mappings.reduce_from_tensor_model_parallel_region(narrow, self._group)
            if self._sequence:
                return mappings.gather_from_sequence_parallel_region(narrow, group=self._group)
            # the identity; backward, the ranks' rows of B each gave a part of the gradient
            return mappings.copy_to_tensor_model_parallel_region(narrow, self._group)

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
        ) -> dict[str, Any]:
            found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            own = make_sharded_tensors_for_checkpoint(
                {A: self.lora_a, B: self.lora_b},
                prefix,
                self._axes,
                sharded_offsets,
                tp_group=self._group,
                dp_cp_group=metadata["dp_cp_group"],
            )
            if self._stride == 2:
                # each rank has rows of gate and of up, as megatron-core's MLP says of the weight
                name = prefix + B
                own[name] = apply_swiglu_sharded_factory(own[name], sharded_offsets)
            return {**found, **own}

    Adapted.__name__ = Adapted.__qualname__ = f"Adapted{linear.__name__}"
    return Adapted


def train_adapters_alone(model: GPTModel, seed: int) -> None:
    """Freeze all other parameters, and draw every A: uniform within 1 / sqrt(in), as a linear layer
    of torch; the same numbers in every layout."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    for name, part in model.sharded_state_dict().items():
        if name.endswith(f".{A}"):
            stacked = part.prepend_axis_num
            place = f"{seed} {part.key} {tuple(part.global_offset[:stacked])}"
            drawn = _uniform(part.global_shape[stacked:], place)
            for axis, start in enumerate(part.global_offset[stacked:]):
                drawn = drawn.narrow(axis, start, part.data.shape[axis])
            part.data.detach().copy_(drawn)
    if model.pre_process and model.config.recompute_granularity is not None:
        # What is recomputed must have an input with a gradient, or autograd passes it over.
        model.embedding.register_forward_hook(_want_gradient)


def _uniform(shape: tuple[int, ...], place: str) -> Tensor:
    """[rank, in] within 1 / sqrt(in), fp32 on the CPU, drawn from the digest of `place`."""
    digest = hashlib.sha256(place.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    bound = float(shape[1]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _want_gradient(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
