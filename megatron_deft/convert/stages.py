"""What both sides of a verification share: stages, and modules that hold weights in turn."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_deft.models.families import ModelSpec
from megatron_deft.platform import device

ROTARY, EMBEDDING, FINAL_NORM, LOGITS = "rotary positions", "embedding", "final norm", "logits"
# What a layer is made of, in the order of computation.
QKV = ("qkv query", "qkv key", "qkv value")
ATTENTION_NORM, ATTENTION, MLP_NORM, MLP = "attention norm", "attention output", "mlp norm", "mlp"
# Before the name of a layer: how clearly its router chose each token's experts, [b, s].
MARGIN = "margin of "

# Takes a stage's name and its values, [b, s, ...] float32 on the CPU, the moment they are computed.
Sink = Callable[[str, Tensor], None]
Dtypes = Mapping[str, torch.dtype]  # by the tensor's Hugging Face name


@dataclass(frozen=True)
class Batch:
    """What both models compute: ids [b, s] int64, and the position [s] int64 of every column.

    window: what sliding windows are shortened to, so that the rows are longer; masks count columns
        and not positions.
    """

    ids: Tensor
    positions: Tensor
    window: int

    def shortened(self, window: int | None) -> int | None:
        """The sliding window that both models use in place of their own."""
        return None if window is None else min(window, self.window)

    def runs(self) -> list[tuple[int, int]]:
        """The positions as (length, start) of runs without a gap."""
        found: list[tuple[int, int]] = []
        for position in self.positions.tolist():
            length, start = found[-1] if found else (0, position)
            if found and position == start + length:
                found[-1] = (length + 1, start)
            else:
                found.append((1, position))
        return found


@dataclass(frozen=True)
class Facts:
    """What must be equal before two models can be compared at all."""

    layers: int
    hidden_size: int
    vocab_size: int
    context_length: int


class Side(Protocol):
    """One of the two models of a verification, by its folder."""

    path: Path
    tokenizer: Path  # the folder with the tokenizer files, if it has any
    spec: ModelSpec  # by its config or manifest

    @property
    def facts(self) -> Facts:
        """Its sizes."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer, the tokens that a token attends to; None: all before it."""

    @property
    def tensors(self) -> dict[str, torch.dtype]:
        """Every tensor by its Hugging Face name, with the dtype that is stored."""

    def load(self, name: str) -> Tensor:
        """One tensor, as stored."""

    def run(
        self,
        batch: Batch,
        dtypes: Dtypes,
        sink: Sink,
        inside: int | None = None,
        forced: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Compute the logits in fp32, of weights rounded to `dtypes`, and report every stage.

        inside: the layer whose parts are reported in place of the stages; the run ends behind it.
        forced: stages of another run; every layer goes on from these and not from what the layer
            before it has put out (and reported).
        """


def layer_stage(layer: int) -> str:
    """The name of a layer's output among the stages."""
    return f"layer {layer}"


def input_of(stage: str) -> str | None:
    """The stage that a layer goes on from; None of any other stage."""
    layer = layer_of(stage)
    if layer is None:
        return None
    return layer_stage(layer - 1) if layer else EMBEDDING


def layer_of(stage: str) -> int | None:
    """The layer whose output the stage is; None of any other stage."""
    match = re.fullmatch(r"layer (\d+)", stage)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Unit:
    """A module that runs once in a forward pass, and how its weights come and go."""

    module: torch.nn.Module
    load: Callable[[], None]
    drop: Callable[[], None]


@contextmanager
def streamed(units: Sequence[Unit]) -> Iterator[None]:
    """Inside the block each unit has its weights while it runs, and only then."""
    with ExitStack() as stack:
        for unit in units:
            unit.drop()
            stack.callback(unit.drop)
            for register, call in (
                (unit.module.register_forward_pre_hook, unit.load),
                (unit.module.register_forward_hook, unit.drop),
            ):
                stack.callback(register(_plainly(call)).remove)
        yield


def _plainly(call: Callable[[], None]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        call()

    return hook


# Turns what a module puts out into the values of stages.
Read = Callable[[Any], Mapping[str, Tensor]]
Readers = Iterable[tuple[torch.nn.Module, Read]]


@contextmanager
def reported(
    layers: Sequence[torch.nn.Module],
    whole: Readers,
    parts: Callable[[torch.nn.Module], Readers],
    form: Callable[[Tensor], Tensor],
    sink: Sink,
    inside: int | None,
    forced: Mapping[str, Tensor] | None,
) -> Iterator[None]:
    """Inside the block a forward pass does what Side.run says; with `inside` it leaves the block.

    Args:
        layers: the decoder's.
        whole, parts: which modules put out stages, and which of a layer put out its parts.
        form: between the layers' form of hidden states and [b, s, h], both ways.
        sink, inside, forced: see Side.run.
    """
    with ExitStack() as stack:
        if inside is None:
            stack.callback(layers[0].register_forward_pre_hook(
                _input_reporting(form, sink), with_kwargs=True
            ).remove)  # fmt: skip
        for module, read in whole if inside is None else parts(layers[inside]):
            stack.callback(module.register_forward_hook(_reporting(read, sink)).remove)
        for i, layer in enumerate(layers if forced else ()):  # hooks run in order: after the report
            assert forced is not None
            value = form(forced[layer_stage(i)]).to(device(), copy=True).contiguous()
            stack.callback(layer.register_forward_hook(partial(_replace, value)).remove)
        if inside is not None:
            stack.enter_context(_ends_behind(layers[inside]))
        yield


def report(sink: Sink, values: Mapping[str, Tensor]) -> None:
    """Hand stages to `sink` as it wants them: copies, for megatron-core adds residuals in place."""
    for name, value in values.items():
        sink(name, value.detach().to("cpu", torch.float32, copy=True))


def _reporting(read: Read, sink: Sink) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        report(sink, read(output))

    return hook


def _input_reporting(form: Callable[[Tensor], Tensor], sink: Sink) -> Callable[..., None]:
    """The first layer's input: some families scale what the embedding puts out."""

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        report(sink, {EMBEDDING: form(inputs[0] if inputs else named["hidden_states"])})

    return hook


def _replace(value: Tensor, module: torch.nn.Module, inputs: Any, output: Any) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


class _Enough(Exception):  # noqa: N818 (not an error)
    """Raised behind the layer that was asked for; nothing has gone wrong."""


@contextmanager
def _ends_behind(module: torch.nn.Module) -> Iterator[None]:
    def hook(*_: Any) -> None:
        raise _Enough

    handle = module.register_forward_hook(hook)
    try:
        yield
    except _Enough:
        pass
    finally:
        handle.remove()


def angles(cos: Tensor, sin: Tensor) -> dict[str, Tensor]:
    """Rotary positions as a stage: [1, s, pairs * 2], without the factor that yarn multiplies in.

    cos, sin: [s, pairs]
    """
    values = torch.stack([cos, sin], dim=-1)
    return {ROTARY: (values / values.norm(dim=-1, keepdim=True)).flatten(1).unsqueeze(0)}
