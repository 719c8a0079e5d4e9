"""What the ranks of runs with adapters do; apart from the tests, which load transformers."""

import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_deft import platform
from megatron_deft.config import RunConfig
from megatron_deft.errors import UserError
from megatron_deft.training.base import read_base
from megatron_deft.training.run import initialize, run


def hear(rank: int, world: int, configs: list[RunConfig]) -> list[str]:
    """What each run says, or the error that stops it."""
    return [_hear(cfg) for cfg in configs]


def _hear(cfg: RunConfig) -> str:
    with redirect_stdout(StringIO()) as said:
        try:
            run(cfg)
        except UserError as error:
            return str(error)
    return said.getvalue()


class MadeShapes(TorchDispatchMode):
    """The shapes of all tensors that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if _is_tensor(t)}
        made = (t for t in tree_leaves(out) if _is_tensor(t))
        self.shapes |= {tuple(t.shape) for t in made if t.untyped_storage().data_ptr() not in given}
        return out


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_alike(parameter: torch.Tensor) -> bool:
    """Whether every tensor rank has the same, unless it is cut among them."""
    group = parallel_state.get_tensor_model_parallel_group()
    held = [torch.empty_like(parameter) for _ in range(group.size())]
    dist.all_gather(held, parameter.detach(), group=group)
    is_cut = getattr(parameter, "tensor_model_parallel", False)
    return is_cut or all(torch.equal(other, held[0]) for other in held)


class Seen(NamedTuple):
    """What a run's first step does on one rank. Numbers and bytes are of what is trained."""

    val_loss: float  # before it
    trained: int
    gradient_bytes: int
    state_bytes: int
    made: set[tuple[int, ...]]
    frozen_changed: list[str]
    replicas_differ: list[str]  # after two steps, what tensor ranks hold alike


def look(rank: int, world: int, configs: list[RunConfig]) -> list[Seen]:
    """The first step of each run; run_dir/first is what is trained before it."""
    os.environ["WORLD_SIZE"] = str(world)
    return [_look(cfg, world) for cfg in configs]


def _look(cfg: RunConfig, world: int) -> Seen:
    base = read_base(cfg.model)
    cfg.validate(world, base.spec)
    initialize(cfg)
    from megatron_deft.training.checkpointing import _model_state
    from megatron_deft.training.trainer import Trainer

    try:
        trainer = Trainer(cfg, base)
        first = Path(cfg.run_dir) / "first"
        first.mkdir(parents=True, exist_ok=True)
        dist_checkpointing.save(_model_state(trainer.model), str(first))
        named = [item for chunk in trainer.model for item in chunk.named_parameters()]
        frozen = {name: p.clone() for name, p in named if not p.requires_grad}
        val_loss = trainer.validate()["val_loss"]
        with MadeShapes() as made:
            trainer.step()
        trainer.step()
        buffers = [b for chunk in trainer.ddp for b in chunk.buffers]
        states = [
            value
            for part in trainer.optimizer.chained_optimizers
            for state in part.optimizer.state.values()
            for value in state.values()
            if _is_tensor(value) and value.ndim
        ]
        return Seen(
            val_loss,
            sum(p.numel() for _, p in named if p.requires_grad),
            sum(buffer.grad_data.nbytes for buffer in buffers),
            sum(value.nbytes for value in states),
            made.shapes,
            [name for name, p in named if name in frozen and not torch.equal(p, frozen[name])],
            [name for name, p in named if p.requires_grad and not _is_alike(p)],
        )
    finally:
        platform.shutdown()
