"""What both sides of a verification share: stages, and modules that hold weights in turn."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

ROTARY, EMBEDDING, FINAL_NORM, LOGITS = "rotary positions", "embedding", "final norm", "logits"
# What a layer is made of, in the order of computation.
QKV = ("qkv query", "qkv key", "qkv value")
ATTENTION_NORM, ATTENTION, MLP_NORM, MLP = "attention norm", "attention output", "mlp norm", "mlp"

# Takes a stage's name and its values, [b, s, ...] float32 on the CPU, the moment they are computed.
Sink = Callable[[str, Tensor], None]
Dtypes = Mapping[str, torch.dtype]  # by the tensor's Hugging Face name


@dataclass(frozen=True)
class Batch:
    """What both models compute: ids [b, s] int64, and the position [s] int64 of every column."""

    ids: Tensor
    positions: Tensor

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
    max_position_embeddings: int


class Side(Protocol):
    """One of the two models of a verification, by its folder."""

    path: Path
    tokenizer: Path  # the folder with the tokenizer files, if it has any

    @property
    def facts(self) -> Facts:
        """Its sizes."""

    @property
    def tensors(self) -> dict[str, torch.dtype]:
        """Every tensor by its Hugging Face name, with the dtype that is stored."""

    def load(self, name: str) -> Tensor:
        """One tensor, as stored."""

    def run(self, batch: Batch, dtypes: Dtypes, sink: Sink, inside: int | None = None) -> None:
        """Compute the logits in fp32, of weights rounded to `dtypes`, and report every stage.

        inside: the layer whose parts are reported in place of the stages; the run ends behind it.
        """


def layer_stage(layer: int) -> str:
    """The name of a layer's output among the stages."""
    return f"layer {layer}"


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


@contextmanager
def observed(readers: Sequence[tuple[torch.nn.Module, Read]], sink: Sink) -> Iterator[None]:
    """Inside the block the outputs of these modules go to `sink`."""
    with ExitStack() as stack:
        for module, read in readers:
            stack.callback(module.register_forward_hook(_reporting(read, sink)).remove)
        yield


def _reporting(read: Read, sink: Sink) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        report(sink, read(output))

    return hook


def report(sink: Sink, values: Mapping[str, Tensor]) -> None:
    """Hand stages to `sink` as it wants them."""
    for name, value in values.items():
        sink(name, value.detach().float().cpu())


@contextmanager
def input_observed(module: torch.nn.Module, name: str, read: Read, sink: Sink) -> Iterator[None]:
    """Inside the block the hidden states that go into `module` go to `sink`."""

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        report(sink, read(inputs[0] if inputs else named["hidden_states"]))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _Enough(Exception):  # noqa: N818 (not an error)
    """Raised behind the layer that was asked for; nothing has gone wrong."""


@contextmanager
def ends_behind(module: torch.nn.Module) -> Iterator[None]:
    """A block that ends, without an error, once `module` has run."""

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
