"""One rank of a training run, from its configuration to its last step."""

import os
import warnings
from pathlib import Path

from megatron_deft import checkpoint_folder
from megatron_deft.config import RunConfig
from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec


def read_base(load: str) -> tuple[Path, ModelSpec]:
    """The checkpoint folder that model.load means, and its architecture.

    Errors: UserError, also for the name of a model on a hub and for a Hugging Face folder.
    """
    path = Path(load)
    converted = (path / checkpoint_folder.MANIFEST).exists()
    if not path.exists() or (not converted and (path / "config.json").exists()):
        what = "is a Hugging Face folder" if path.exists() else "does not exist"
        raise UserError(
            f"model.load={load} {what}: run `megatron-deft convert import HF_FOLDER WEIGHTS` "
            "and set model.load=WEIGHTS"
        )
    folder = checkpoint_folder.resolve(path)
    return folder, ModelSpec.from_json(checkpoint_folder.read_manifest(folder)["spec"])


def initialize(cfg: RunConfig) -> None:
    """Start torch.distributed and megatron-core in the layout of `cfg`."""
    from megatron_deft import platform

    parallel = cfg.parallel
    platform.initialize(
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        cfg.seed,
        expert=parallel.expert,
        virtual=parallel.chunks if parallel.chunks > 1 else None,
    )


def run(cfg: RunConfig) -> dict[str, float]:
    """Train as `cfg` says, in this process, as one rank of the world that torchrun describes.

    Returns: the metrics of the last step, the same on every rank.
    Errors: UserError for everything a user can mend.
    """
    from megatron_deft import platform

    folder, spec = read_base(cfg.model.load)
    cfg.validate(int(os.environ.get("WORLD_SIZE", 1)), spec)
    # Between torch and megatron-core 0.16; who trains can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message="When using async grad allreduce")
    initialize(cfg)
    try:
        from megatron_deft.training.trainer import Trainer  # imports megatron-core: now is safe

        return Trainer(cfg, folder, spec).run()
    finally:
        platform.shutdown()
