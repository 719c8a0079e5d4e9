"""Which device a process computes on, and the start and end of torch.distributed and megatron-core.

The one place that asks whether there is a GPU.
"""

import gc
import os
import random
from datetime import timedelta
from typing import Any

import numpy
import torch
import torch.distributed as dist

from megatron_deft.errors import UserError
from megatron_deft.platform.cpu import (
    cpu_platform,
    enter_cpu_platform,
    import_megatron,
    leave_cpu_platform,
)
from megatron_deft.platform.deterministic import deterministic
from megatron_deft.platform.store import meet

__all__ = [
    "TORCHRUN_ENVIRONMENT",
    "backend",
    "cpu_platform",
    "deterministic",
    "device",
    "device_name",
    "enter_cpu_platform",
    "import_megatron",
    "initialize",
    "leave_cpu_platform",
    "seed_step",
    "shutdown",
]

TORCHRUN_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SEED_STEP_PER_PIPELINE_STAGE = 100  # as Megatron-LM spaces them

_owns_process_group = False  # whether initialize(), not its caller, started torch.distributed


def device() -> torch.device:
    """The device of this rank: its GPU (torch's current one, see initialize) or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_name() -> str:
    """What the maker calls device(), such as "NVIDIA H100 80GB HBM3"; "CPU" without a GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def backend() -> str:
    """The torch.distributed backend that goes with device(): "nccl" or "gloo"."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def initialize(
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    seed: int = 1234,
    *,
    expert: int = 1,
    expert_tensor: int | None = None,
    virtual: int | None = None,
    timeout: timedelta | None = None,
    patience: timedelta | None = None,
) -> None:
    """Start torch.distributed, megatron-core's process groups and the random generators.

    torch.distributed is used as it is when it runs already, else started from torchrun's
    environment, else as a world of one process (no port, no file). On a machine without a GPU
    megatron-core is redirected to the CPU for the rest of the process.

    Args:
        tensor, pipeline, context: parallel sizes; the rest of the world is data parallel.
        expert: over how many ranks of a pipeline stage a layer's experts are spread.
        expert_tensor: how many ranks share each expert's matrices; None: as many as `tensor`.
        virtual: model chunks of each pipeline stage (interleaved schedule); None: one.
        timeout: of collectives; None: torch's and megatron-core's own.
        patience: how long to wait for the other ranks to come; None: store.PATIENCE.
        seed: of python, numpy, torch and megatron-core's generators; at least 0. Pipeline stages
            draw differently, and so do tensor-parallel ranks inside tensor-parallel regions;
            data-parallel ranks draw alike.

    Errors: UserError when the parallel sizes do not divide the world or the environment has only
    some of torchrun's variables; RuntimeError naming the ranks that do not come.
    """
    enter_cpu_platform()
    from megatron.core import parallel_state

    assert not parallel_state.model_parallel_is_initialized(), "shutdown() first"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    _start_torch_distributed(timeout, patience)
    minutes: dict[str, Any] = {}
    if timeout is not None:
        minutes = {"distributed_timeout_minutes": timeout.total_seconds() / 60}
    try:
        _check_layout(tensor, pipeline, context, expert, expert_tensor or tensor)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
            virtual_pipeline_model_parallel_size=virtual,
            **minutes,
        )
        seed_everything(seed)
    except BaseException:
        shutdown()
        raise


def _start_torch_distributed(timeout: timedelta | None, patience: timedelta | None) -> None:
    global _owns_process_group
    if dist.is_initialized():
        return
    missing = [name for name in TORCHRUN_ENVIRONMENT if name not in os.environ]
    if not missing:
        dist.init_process_group(backend(), timeout=timeout, **meet(patience))
    elif len(missing) == len(TORCHRUN_ENVIRONMENT):
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1)
    else:  # Not a world of one: eight such processes would train eight separate models.
        raise UserError(
            f"environment: {', '.join(missing)} not set while other variables of torchrun are: "
            f"start with torchrun, or unset {', '.join(TORCHRUN_ENVIRONMENT)} for one process"
        )
    _owns_process_group = True


def _check_layout(
    tensor: int, pipeline: int, context: int, expert: int, expert_tensor: int
) -> None:
    world, model = dist.get_world_size(), tensor * pipeline * context
    if model < 1 or world % model:
        raise UserError(
            f"parallel: tensor {tensor} x pipeline {pipeline} x context {context} = {model} must "
            f"divide the {world} started process(es): change the sizes or torchrun --nproc-per-node"
        )
    if expert < 1 or world % (expert_tensor * pipeline * expert):
        raise UserError(
            f"parallel: expert tensor {expert_tensor} x pipeline {pipeline} x expert {expert} must "
            f"divide the {world} started process(es): change the sizes or torchrun --nproc-per-node"
        )


def seed_everything(seed: int) -> None:
    """Seed python, numpy, torch and megatron-core's RNG tracker; parallel_state must be up."""
    from megatron.core import parallel_state, tensor_parallel

    seed += SEED_STEP_PER_PIPELINE_STAGE * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def seed_step(seed: int, step: int) -> None:
    """Seed every generator for one step of a run: what it draws depends on nothing before it.

    A generator that runs on through the steps was rejected: in packed rows attention draws by the
    lengths of documents, which differ among data-parallel ranks, and so would the states to save.
    """
    mixed = numpy.random.Philox(key=numpy.array([seed, step], numpy.uint64)).random_raw()
    seed_everything(int(mixed) >> 2)  # stages and tensor ranks add to it


def shutdown() -> None:
    """Undo initialize(). Idempotent; a process group that the caller started is left running."""
    global _owns_process_group
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        # megatron-core forgets its groups, some twenty, and leaves them to torch: each keeps its
        # connections and threads that wake up to look around for as long as the process lives.
        for group in parallel_state._global_process_group_list[1:]:  # the first is the caller's
            dist.destroy_process_group(group)
        parallel_state.destroy_model_parallel()
        gc.collect()  # models and optimizers, which stand in circles, hold groups too
    if _owns_process_group and dist.is_initialized():
        dist.destroy_process_group()
    _owns_process_group = False
