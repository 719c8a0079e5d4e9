"""One rank of a training run, from its configuration to its end."""

import os
import warnings
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from megatron_deft.config import RunConfig
from megatron_deft.files import hold_folder
from megatron_deft.processes import STOPS
from megatron_deft.training.base import Base, read_base
from megatron_deft.training.preemption import LAUNCHED, Preemption, Stopped


def initialize(cfg: RunConfig) -> None:
    """Start torch.distributed and megatron-core in the layout of `cfg`."""
    from megatron_deft import platform
    from megatron_deft.training.hang import SLOW

    parallel, hang = cfg.parallel, cfg.train.hang_seconds
    platform.initialize(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        cfg.seed,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        virtual=parallel.chunks if parallel.chunks > 1 else None,
        # Who hangs is to be named before torch ends the ranks that wait for it.
        timeout=None if hang is None else timedelta(seconds=10 * hang),
        patience=None if hang is None else timedelta(seconds=SLOW * hang),
    )


def run(cfg: RunConfig) -> dict[str, float]:
    """Train as `cfg` says, in this process, as one rank of the world that torchrun describes.

    Returns: the metrics of the last step, the same on every rank.
    Errors: UserError for everything a user can mend.
    """
    base = read_base(cfg.model)
    cfg.validate(int(os.environ.get("WORLD_SIZE", 1)), base.spec)
    # Between torch and megatron-core 0.16; who trains can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # Experts that tensor ranks hold whole (parallel.expert_tensor=1) have no part of a sequence.
    warnings.filterwarnings("ignore", message="`sequence_parallel` is set to `True`, but tensor")
    # It doubts core_attn, whatever attends; the key's own help says when it is worth it.
    warnings.filterwarnings("ignore", message="If you are using transformer_engine")
    with Preemption(cfg.train.exit_seconds) as preemption:
        try:
            return _run(cfg, base, preemption)
        except Stopped as why:
            _say(f"stopped before its first step ({why}): the same command goes on")
            return {}


def _run(cfg: RunConfig, base: Base, preemption: Preemption) -> dict[str, float]:
    from megatron_deft import platform

    if max(cfg.parallel.tensor, cfg.parallel.context) > 1:
        # One queue: what such ranks send starts before the products that are to hide it, which
        # megatron-core counts on. To be set before the GPU is first used.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with ExitStack() as held:
        held.enter_context(platform.deterministic(cfg.deterministic))
        initialize(cfg)
        held.callback(platform.shutdown)
        # these import megatron-core: now is safe
        from megatron_deft.data.loader import naming_dead_readers
        from megatron_deft.training.data import on_rank_0
        from megatron_deft.training.hang import HangWatch
        from megatron_deft.training.obstacles import obstacles, obstacles_to_monitors, refuse
        from megatron_deft.training.restarts import LOCK_SECONDS, this_attempt
        from megatron_deft.training.trainer import Trainer

        watch = held.enter_context(HangWatch(cfg.train.hang_seconds))
        refuse(obstacles(cfg, base.spec))
        on_rank_0(lambda: refuse(obstacles_to_monitors(cfg.monitor)), is_quick=True)
        attempt = this_attempt(Path(cfg.run_dir))
        patience = LOCK_SECONDS if attempt.number > 1 else 0.0
        on_rank_0(lambda: held.enter_context(hold_folder(cfg.run_dir, "run_dir", patience)))
        _stop_if_asked(preemption)
        trainer = Trainer(cfg, base, attempt, preemption, watch)
        _stop_if_asked(preemption)
        with naming_dead_readers(cfg.data.workers):
            metrics = trainer.run()
        is_stopped, exports = trainer.stopped is not None, trainer.exports
        if is_stopped:
            _say(
                f"stopped after step {trainer.position.step} of {trainer.data.total_steps} "
                f"({trainer.stopped}); go on with the same command and --resume"
            )
        del trainer  # platform.shutdown frees it, and with it the last holders of its groups
        ending = watch.limit_end()
    ending.cancel()
    if is_stopped:
        exports.abandon()
    else:  # behind the collectives: whoever waits for rank 0 is no rank
        exports.finish(lambda: any(preemption.signalled()))
    if LAUNCHED in os.environ:  # else the process goes on
        watch.limit_end()
    return metrics


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def _stop_if_asked(preemption: Preemption) -> None:
    """All ranks come here. Errors: Stopped, on every rank, when any of them has got a signal."""
    import torch
    import torch.distributed as dist

    from megatron_deft.platform import device

    asked = torch.tensor(preemption.signalled(), device=device()).int()
    dist.all_reduce(asked, op=dist.ReduceOp.MAX)
    for number, is_asked in zip(STOPS, asked.tolist(), strict=True):
        if is_asked:
            raise Stopped(number.name)
