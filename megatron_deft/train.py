"""One rank of a training run: `torchrun --nproc-per-node N -m megatron_deft.train CONFIG a.b=v ...`

`megatron-deft train` starts the same with fewer words.
"""

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence

from megatron_deft import checkpoint_folder
from megatron_deft.config import RunConfig, load_config
from megatron_deft.errors import UserError

SECONDS_FOR_RANK_0 = 2.0  # others let rank 0 speak first: mostly all ranks fail alike


def parser() -> argparse.ArgumentParser:
    """The arguments of one rank."""
    parse = argparse.ArgumentParser(
        prog="python -m megatron_deft.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("config", help="YAML file (keys: megatron-deft train --help-config)")
    parse.add_argument("overrides", nargs="*", help="a.b=value, on top of the file")
    parse.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest whole checkpoint of run_dir; the same as train.resume=must",
    )
    parse.add_argument("--traceback", action="store_true", help="show the stack of an error")
    return parse


def read_config(arguments: argparse.Namespace) -> RunConfig:
    """The run that the arguments ask for."""
    extra = ["train.resume=must"] if arguments.resume else []
    return load_config(arguments.config, [*arguments.overrides, *extra])


def main(argv: Sequence[str] | None = None) -> int:
    """Train; exit code 0, or 2 with one line on stderr for a mistake of the user."""
    arguments = parser().parse_args(argv)
    try:
        run(read_config(arguments))
    except (UserError, OSError) as error:
        if arguments.traceback:
            traceback.print_exc()
        _report(error)
        return 2
    return 0


def _report(error: Exception) -> None:
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(SECONDS_FOR_RANK_0)
    where = f" (rank {rank})" if rank else ""
    print(f"megatron-deft: error{where}: {error}", file=sys.stderr, flush=True)


def run(cfg: RunConfig) -> dict[str, float]:
    """Train as `cfg` says, in this process as one rank of the world that torchrun describes."""
    from megatron_deft.models.families import ModelSpec

    folder = checkpoint_folder.resolve(cfg.model.load)
    spec = ModelSpec.from_json(checkpoint_folder.read_manifest(folder)["spec"])
    cfg.validate(int(os.environ.get("WORLD_SIZE", 1)), spec)

    from megatron_deft import platform

    # Deprecations between torch and megatron-core 0.16, which who trains can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    platform.initialize(cfg.parallel.tensor, cfg.parallel.pipeline, cfg.parallel.context, cfg.seed)
    from megatron_deft.training.trainer import Trainer  # after initialize: it imports megatron-core

    try:
        return Trainer(cfg, folder, spec).run()
    finally:
        platform.shutdown()


if __name__ == "__main__":
    sys.exit(main())
