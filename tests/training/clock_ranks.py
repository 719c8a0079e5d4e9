"""What the ranks of a run do when one is late; apart from the tests: they need no transformers."""

import os
import time
from typing import Any

from megatron_deft import platform
from megatron_deft.config import RunConfig
from megatron_deft.training.base import read_base
from megatron_deft.training.run import initialize


def step_with_a_late_stage(rank: int, world: int, cfg: RunConfig, late: float) -> dict[str, float]:
    """The metrics of one step in whose forward pass the last rank sleeps for `late` seconds."""
    os.environ["WORLD_SIZE"] = str(world)
    base = read_base(cfg.model)
    initialize(cfg)
    from megatron_deft.training.trainer import Trainer

    def sleep(*_: Any) -> None:
        time.sleep(late)

    try:
        trainer = Trainer(cfg, base)
        if rank == world - 1:
            trainer.model[0].decoder.register_forward_pre_hook(sleep)
        return trainer.step()
    finally:
        platform.shutdown()
