"""One rank of a training run, from its configuration to its last step."""

import os
import warnings
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

from megatron_deft.config import RunConfig
from megatron_deft.files import hold_folder
from megatron_deft.training.base import read_base


def initialize(cfg: RunConfig) -> None:
    """Start torch.distributed and megatron-core in the layout of `cfg`."""
    from megatron_deft import platform

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
    )


def run(cfg: RunConfig) -> dict[str, float]:
    """Train as `cfg` says, in this process, as one rank of the world that torchrun describes.

    Returns: the metrics of the last step, the same on every rank.
    Errors: UserError for everything a user can mend.
    """
    from megatron_deft import platform

    base = read_base(cfg.model)
    cfg.validate(int(os.environ.get("WORLD_SIZE", 1)), base.spec)
    # Between torch and megatron-core 0.16; who trains can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message="When using async grad allreduce")
    # It doubts core_attn, whatever attends; the key's own help says when it is worth it.
    warnings.filterwarnings("ignore", message="If you are using transformer_engine")
    with ExitStack() as held:
        held.enter_context(platform.deterministic(cfg.deterministic))
        initialize(cfg)
        held.callback(platform.shutdown)
        # these import megatron-core: now is safe
        from megatron_deft.data.loader import naming_dead_readers
        from megatron_deft.training.data import on_rank_0
        from megatron_deft.training.restarts import LOCK_SECONDS, this_attempt
        from megatron_deft.training.trainer import Trainer

        attempt = this_attempt(Path(cfg.run_dir))
        patience = LOCK_SECONDS if attempt.number > 1 else 0.0
        on_rank_0(lambda: held.enter_context(hold_folder(cfg.run_dir, "run_dir", patience)))
        trainer = Trainer(cfg, base, attempt)
        with naming_dead_readers(cfg.data.workers):
            metrics = trainer.run()
        is_stopped, exports = trainer.stopped is not None, trainer.exports
        del trainer  # platform.shutdown frees it, and with it the last holders of its groups
    if is_stopped:
        exports.abandon()
    else:
        exports.finish()  # behind the collectives: whoever waits for rank 0 is no rank
    return metrics
