"""One rank of a training run, from its configuration to its last step."""

import os
import warnings

from megatron_deft import checkpoint_folder
from megatron_deft.config import RunConfig


def run(cfg: RunConfig) -> dict[str, float]:
    """Train as `cfg` says, in this process, as one rank of the world that torchrun describes.

    Returns: the metrics of the last step, the same on every rank.
    Errors: UserError for everything a user can mend.
    """
    from megatron_deft import platform
    from megatron_deft.models.families import ModelSpec

    folder = checkpoint_folder.resolve(cfg.model.load)
    spec = ModelSpec.from_json(checkpoint_folder.read_manifest(folder)["spec"])
    cfg.validate(int(os.environ.get("WORLD_SIZE", 1)), spec)
    # Between torch and megatron-core 0.16; who trains can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message="When using async grad allreduce")
    parallel = cfg.parallel
    platform.initialize(parallel.tensor, parallel.pipeline, parallel.context, cfg.seed)
    try:
        from megatron_deft.training.trainer import Trainer  # imports megatron-core: now is safe

        return Trainer(cfg, folder, spec).run()
    finally:
        platform.shutdown()
