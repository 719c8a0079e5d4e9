"""Run a function on real gloo ranks, one process each."""

import os
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from one process that has imported torch and megatron-core: the imports, several
# seconds each, are then paid once and not once per rank and test.
forkserver.set_forkserver_preload(["tests.preload"])


def _worker(
    rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    result = fn(rank, world_size, *args)
    torch.save(result, Path(folder) / f"result_{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on `world_size` gloo ranks.

    `fn` is a module-level function; what it returns must be picklable and comes back as a list in
    rank order. The first rank that fails re-raises here with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _worker,
            args=(world_size, folder, fn, args),
            nprocs=world_size,
            start_method="forkserver",
        )
        return [
            torch.load(Path(folder) / f"result_{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]
