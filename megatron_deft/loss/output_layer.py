"""Past the logits: a megatron-core model's output layer routed into `fused_linear_loss`.

While a forward with labels runs, the output layer hands on the hidden states it was given, as they
are, and the loss hook, which finds them in the place of logits, asks here for the loss. A forward
without labels, inference among them, runs the layer as ever.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_deft.errors import UserError
from megatron_deft.loss.fused_linear import fused_linear_loss
from megatron_deft.loss.statistics import TokenStatistics
from megatron_deft.objectives import Objective

SMALL = 2**20  # weights, from where on the products outweigh what comes with each tile
ROUTE = "_route_past_logits"  # the attribute under which a model has its Route


@dataclass(frozen=True)
class Softcap:
    """Forward hook of an output layer, whose logits become softcap * tanh(logits / softcap)."""

    softcap: float

    def __call__(self, module: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """(logits, bias) -> the same, capped; hidden states on their way through as they are."""
        logits, bias = output
        if logits is inputs[0]:
            return output
        return (logits / self.softcap).tanh() * self.softcap, bias


def obstacle_to_fused_linear(module: nn.Module) -> str:
    """Why this LanguageModule's output layer cannot be routed past the logits, or "".

    Whatever might do something to logits before the loss sees them stands in the way.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.mamba import MambaModel
    from megatron.core.tensor_parallel import ColumnParallelLinear

    layer: Any = getattr(module, "output_layer", None)
    if layer is None:
        return ""  # a pipeline stage without one has nothing to route
    kind, known = type(module), GPTModel if isinstance(module, GPTModel) else MambaModel
    for name in ("forward", "_postprocess"):
        if name in vars(module) or getattr(kind, name, None) is not getattr(known, name, None):
            return f"{kind.__name__}.{name} is not {known.__name__}'s"
    is_replaced = "forward" in vars(layer) and ROUTE not in vars(module)
    if is_replaced or type(layer).forward is not ColumnParallelLinear.forward:
        return f"the output layer, a {type(layer).__name__}, has a forward of its own"
    if layer.skip_bias_add:
        return "the output layer hands its bias on instead of adding it"
    # Before the layer is another matter: DistributedDataParallel waits there for parameters.
    hooks = list(layer._forward_hooks.values())
    strange = [type(hook).__name__ for hook in hooks if not isinstance(hook, Softcap)]
    if strange or len(hooks) > 1:
        names = ", ".join(strange or ["two softcaps"])
        return f"the output layer has hooks, which want its logits: {names}"
    for name in ("defer_embedding_wgrad_compute", "cpu_offloading"):
        if getattr(layer.config, name, False):
            return f"the model's config has {name}"
    return ""


def is_small(module: nn.Module) -> str:
    """Why the logits path is as fast and its logits no burden, or ""."""
    layer: Any = getattr(module, "output_layer", None)
    if layer is None:
        return ""
    columns, size = layer.output_size_per_partition, layer.input_size
    return f"the output layer is small, {columns} x {size}" if columns * size < SMALL else ""


class Route:
    """The way of one model past its logits.

    kept_tokens: an upper bound of the labels that count, see `fused_linear_loss`; not for the heads
                 of multi-token prediction, whose labels are rolled
    """

    def __init__(self, module: Any, chunk_tokens: int | None) -> None:
        self.chunk_tokens = chunk_tokens
        self.is_open = False
        self._weight: Tensor | None = None
        self._signature = inspect.signature(type(module).forward)
        self._layer: Any = module.output_layer
        self._handles = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]
        route, forward = self, self._layer.forward

        def pass_on(
            layer: Any,
            input_: Tensor,
            weight: Tensor | None = None,
            runtime_gather_output: bool | None = None,
        ) -> tuple[Tensor, Tensor | None]:
            used: Any = layer.weight if weight is None else weight
            if (not route.is_open or used is not layer.weight) and torch.is_grad_enabled():
                # Logits, or an embedding, give it a gradient in the ordinary way: megatron-core's
                # DistributedDataParallel is to add that, too, to what is in main_grad already.
                used.zero_out_wgrad = True
            if not route.is_open:
                return forward(input_, weight, runtime_gather_output)
            route._weight = used
            return input_, None

        self._layer.forward = MethodType(pass_on, self._layer)

    def close(self) -> None:
        """Give the layer its own forward back."""
        for handle in self._handles:
            handle.remove()
        vars(self._layer).pop("forward", None)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = self._signature.bind_partial(module, *args, **kwargs).arguments
        self.is_open = given.get("labels") is not None
        if self.is_open and (obstacle := obstacle_to_fused_linear(module)):
            self.is_open = False
            raise UserError(f"fused_linear: {obstacle}, since attach; attach again without it")

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.is_open, self._weight = False, None

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        objective: Objective,
        group: dist.ProcessGroup,
        vocab_size: int,
        ignore_index: int,
        batch_group: dist.ProcessGroup | None,
        kept_tokens: int | None,
    ) -> tuple[Tensor, TokenStatistics]:
        """Hidden [s, b, H] (or this rank's part of s), labels [s, b] -> loss and statistics."""
        layer, weight = self._layer, self._weight
        assert weight is not None, "the output layer runs before the loss"
        # as megatron-core's layer does with gradient_accumulation_fusion, whose kernel is not
        # needed here; its FSDP has a main_grad of another kind
        main_grad = (
            weight.requires_grad
            and hasattr(weight, "grad_added_to_main_grad")
            and isinstance(getattr(weight, "main_grad", None), Tensor)
            and not hasattr(weight, "__fsdp_param__")
        )
        caps = [h.softcap for h in layer._forward_hooks.values() if isinstance(h, Softcap)]
        return fused_linear_loss(
            hidden,
            weight,
            labels,
            objective,
            group=group,
            sequence_parallel=layer.sequence_parallel,
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            chunk_tokens=self.chunk_tokens,
            bias=layer.bias,
            softcap=caps[0] if caps else None,
            batch_group=batch_group,
            reduction="none",
            main_grad=main_grad,
            kept_tokens=kept_tokens,
        )
