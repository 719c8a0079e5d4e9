"""What ranks do that keep their optimizer in host memory, on a machine that has no other."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_deft import platform
from megatron_deft.config import RunConfig
from megatron_deft.training.base import read_base
from megatron_deft.training.run import initialize


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """megatron-core's hybrid optimizer, as it is, finds parameters on a "GPU": the CPU.

    Of its question whether a tensor is there, only that after a copy to the host is denied.
    """
    from megatron_deft.platform import cpu

    def is_cuda(tensor: Tensor) -> bool:
        caller = sys._getframe(1)
        asks = caller.f_globals["__name__"].endswith("cpu_offloading.hybrid_optimizer")
        return asks and not caller.f_locals.get("cpu_copy", False)

    with (
        patch.object(Tensor, "is_cuda", property(is_cuda), create=True),
        patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        patch.object(torch.cuda, "stream", nullcontext),
        patch.object(cpu._Stream, "wait", lambda event, stream: None, create=True),
    ):
        yield


Sizes = dict[str, list[tuple[int, int]]]


def train_emulated(rank: int, world: int, configs: dict[str, RunConfig]) -> Sizes:
    """Train the runs.

    returns: of each, by part of its optimizer, how many numbers of this rank's parameters the CPU
             updates and how many the GPU
    """
    os.environ["WORLD_SIZE"] = str(world)
    return {name: _train(cfg, world) for name, cfg in configs.items()}


def _train(cfg: RunConfig, world: int) -> list[tuple[int, int]]:
    base = read_base(cfg.model)
    cfg.validate(world, base.spec)
    initialize(cfg)
    from megatron_deft.training.trainer import Trainer

    try:
        with emulated_gpu():
            trainer = Trainer(cfg, base)
            if cfg.optim.cpu_offload and cfg.train.resume == "no":
                trainer.save()  # before there is any state
            for group in trainer.optimizer.param_groups:
                group["fused"] = True  # megatron-core's choice for the CPU: another rounding
            trainer.run()
        if cfg.optim.cpu_offload:
            _check_memory(trainer)
        return [_sizes(part.optimizer) for part in trainer.optimizer.chained_optimizers]
    finally:
        platform.shutdown()


def _check_memory(trainer: Any) -> None:
    """No fp32 weights on the GPU beside 16-bit ones, and this rank's state on the host alone."""
    for part in trainer.optimizer.chained_optimizers:
        kept = {weight.dtype for weight in part.get_parameters()}
        assert kept == {trainer.model[0].config.params_dtype}, kept
        for state in part.optimizer.state.values():
            for moment in (state["exp_avg"], state["exp_avg_sq"]):
                assert moment.untyped_storage().nbytes() == moment.nbytes


def _sizes(optimizer: Any) -> tuple[int, int]:
    def size(optimizers: list[Any]) -> int:
        groups = (group for one in optimizers for group in one.param_groups)
        return sum(weight.numel() for group in groups for weight in group["params"])

    if not hasattr(optimizer, "cpu_optimizers"):
        return 0, size([optimizer])
    on_gpu = [] if optimizer.gpu_optimizer is None else [optimizer.gpu_optimizer]
    return size(optimizer.cpu_optimizers), size(on_gpu)
