"""What the ranks of whole runs do; apart from the tests: they need not load transformers."""

import json
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from megatron_deft import platform
from megatron_deft.config import RunConfig, load_config
from megatron_deft.errors import UserError
from megatron_deft.training.base import read_base
from megatron_deft.training.run import initialize, run

STEPS = 20


def config(base: Path, run_dir: Path, **overrides: Any) -> RunConfig:
    settings = {
        "run_dir": run_dir,
        "model.load": base / "megatron",
        "model.dtype": "fp32",
        "data.train_files": f"[{base / 'train.jsonl'}]",
        "data.show_sample": "false",
        "data.max_length": 64,
        "optim.lr": 0.002,
        "train.global_batch": 8,
        "train.micro_batch": 2,
        "train.steps": STEPS,
        "train.save_at_end": "false",
        "monitor.tensorboard": "false",
        "parallel.vocab_pad_multiple": 8,
        **overrides,
    }
    empty = run_dir.parent / "empty.yaml"
    empty.parent.mkdir(parents=True, exist_ok=True)
    empty.write_text("{}\n")
    return load_config(empty, [f"{key}={value}" for key, value in settings.items()])


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


MEASURED = ("_seconds", "_per_second", "tflops", "mfu", "peak_memory_gb")  # ends of names


def same_but_time(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without what was measured of the machine."""
    return [{k: v for k, v in line.items() if not k.endswith(MEASURED)} for line in lines]


def train_all(rank: int, world: int, configs: list[RunConfig]) -> None:
    os.environ["WORLD_SIZE"] = str(world)
    for cfg in configs:
        run(cfg)


def train_and_hear(rank: int, world: int, cfg: RunConfig) -> str:
    """What it says."""
    with redirect_stdout(StringIO()) as said:
        run(cfg)
    return said.getvalue()


def train_in_buckets(rank: int, world: int, configs: list[RunConfig], size: int) -> None:
    """As train_all; gradients in buckets of `size` numbers or a little more, if they overlap."""
    from megatron_deft.training import model

    model.DistributedDataParallelConfig = partial(  # type: ignore[misc]
        model.DistributedDataParallelConfig, bucket_size=size
    )
    train_all(rank, world, configs)


def move(rank: int, world: int, layouts: Mapping[Any, RunConfig]) -> dict[Any, set[int]]:
    """Load each run's checkpoint at its layout, save it there at once, and go on training.

    returns: the numbers of steps that this rank's parameters have seen before it goes on
    """
    seen = {}
    for name, cfg in layouts.items():
        os.environ["WORLD_SIZE"] = str(world)
        seen[name] = _move(cfg, world)
    return seen


def _move(cfg: RunConfig, world: int) -> set[int]:
    base = read_base(cfg.model)
    cfg.validate(world, base.spec)
    initialize(cfg)
    from megatron_deft.training.optimizer import steps
    from megatron_deft.training.trainer import Trainer

    try:
        trainer = Trainer(cfg, base)
        trainer.save()
        seen = steps(trainer.optimizer)
        trainer.run()
        return seen
    finally:
        platform.shutdown()


def train_groups(rank: int, world: int, groups: list[list[RunConfig]]) -> dict[str, str]:
    """Train runs of one model and layout after another in process groups that they share.

    returns: the error of each run that is refused, by its run_dir
    """
    os.environ["WORLD_SIZE"] = str(world)
    refused = {}
    for configs in groups:
        base = read_base(configs[0].model)
        initialize(configs[0])
        from megatron_deft.training.trainer import Trainer

        for cfg in configs:
            try:
                cfg.validate(world, base.spec)
                Trainer(cfg, base).run()
            except UserError as error:
                refused[cfg.run_dir] = str(error)
        platform.shutdown()
    return refused
