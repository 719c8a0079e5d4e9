"""What a run is: every key with its type, default, unit and legal values, and which runs can be.

A section that exists holds legal values: types and ranges are checked when it is made. What depends
on the number of processes or on the model is checked by `RunConfig.validate` (config/checks.py).
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from megatron_deft.config import checks
from megatron_deft.config.checks import ModelShape
from megatron_deft.config.data import DataConfig
from megatron_deft.config.lora import LoraConfig
from megatron_deft.config.model import LossConfig, ModelConfig, ParallelConfig
from megatron_deft.config.section import Section
from megatron_deft.config.train import CheckpointConfig, MonitorConfig, OptimConfig, TrainConfig
from megatron_deft.config.values import NOT_EMPTY, SEED, key


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """A training run, whole."""

    objective: str = key("training objective; `megatron-deft objectives` lists them", "deft")
    reduction: Literal["token", "micro_batch", "sample"] = key(
        "mean over the trained tokens of the global batch; or per micro-batch and rank, then over "
        "those (as the released trainers do); or per sample, then over samples", "token"
    )  # fmt: skip
    seed: int = key("of data order, dropout and initialisation", 1234, SEED)
    deterministic: bool = key(
        "the same numbers to the last bit from run to run, at the same layout; slower on a GPU. An "
        "operation that cannot is an error", False
    )  # fmt: skip
    run_dir: str = key("folder of checkpoints, metrics and logs; made if absent", legal=NOT_EMPTY)
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def data_parallel(self, world_size: int) -> int:
        """Number of data-parallel ranks among `world_size` processes."""
        parallel = self.parallel
        return world_size // (parallel.tensor * parallel.pipeline * parallel.context)

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches that one data-parallel rank runs in one step."""
        return self.train.global_batch // (self.train.micro_batch * self.data_parallel(world_size))

    def validate(self, world_size: int, spec: ModelShape | None) -> None:
        """Refuse what cannot run on `world_size` processes with the model `spec` (None: unknown).

        Errors: UserError, one line naming key, value and what is legal.
        """
        checks.validate(self, world_size, spec)


# Keys of which one has to be given; which one the section itself checks.
ONE_OF = (("model.load", "model.hf"), ("data.train_sets", "data.train_files"))


def is_required(declaration: Any) -> bool:
    """Whether a dataclass field has no default."""
    return declaration.default is MISSING and declaration.default_factory is MISSING
