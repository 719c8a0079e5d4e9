"""How a run goes: its optimizer, how long, what is kept of it and where it is watched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_deft.config.section import Section
from megatron_deft.config.values import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    DURATION,
    FRACTION,
    NOT_EMPTY,
    key,
    seconds,
)
from megatron_deft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """AdamW and the learning-rate schedule."""

    path: ClassVar[str] = "optim."
    lr: float = key("peak learning rate, reached when the warm-up ends", 1e-5, ABOVE_0)
    min_lr: float = key("learning rate where cosine, linear and wsd end; <= lr", 0.0, AT_LEAST_0)
    schedule: Literal["cosine", "wsd", "constant", "linear"] = key(
        "shape after the warm-up; wsd (warm-up, stable, decay) holds lr, then falls as a cosine",
        "cosine",
    )
    warmup_ratio: float = key("share of all steps spent in linear warm-up from 0", 0.1, FRACTION)
    warmup_steps: int | None = key(
        "warm-up in steps; takes the place of warmup_ratio", None, AT_LEAST_0
    )
    wsd_decay_ratio: float = key(
        "wsd: share of the steps after warm-up spent in decay", 0.1, FRACTION
    )
    betas: tuple[float, float] = key("decay of the two moments", (0.9, 0.95), BELOW_1)
    eps: float = key("added to the root of the second moment", 1e-8, ABOVE_0)
    weight_decay: float = key("decoupled weight decay, per unit of learning rate", 0.01, AT_LEAST_0)
    clip_grad: float = key(
        "largest gradient norm over all parameters; 0: no clipping", 1.0, AT_LEAST_0
    )
    cpu_offload: float = key(
        "share of each GPU's optimizer state, fp32 weights of 16-bit ones included, that lives in "
        "host memory and is updated there, whole parameters at a time; 0: none", 0.0, FRACTION
    )  # fmt: skip
    loss_scale: float | None = key(
        "fp16: what the loss is multiplied by before the backward pass; null: it finds its own, "
        "halved where gradients overflow (such steps change nothing) and doubled where none did",
        None, ABOVE_0
    )  # fmt: skip
    initial_loss_scale: float = key(
        "fp16: where it starts; the loss is a sum over tokens", 4096.0, ABOVE_0
    )
    min_loss_scale: float = key("fp16: where it stops to fall", 1.0, ABOVE_0)
    loss_scale_window: int = key(
        "fp16: steps in a row without overflow until it is doubled", 1000, AT_LEAST_1
    )
    hysteresis: int = key("fp16: overflows until it is halved", 2, AT_LEAST_1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """How long to train and what to keep on the way. A step is one optimizer update."""

    path: ClassVar[str] = "train."
    global_batch: int = key("samples in one step, over all processes", 256, AT_LEAST_1)
    micro_batch: int = key("samples in one forward pass of one data-parallel rank", 1, AT_LEAST_1)
    epochs: float | None = key("passes over the data; 1 unless steps is given", None, ABOVE_0)
    steps: int | None = key("number of steps; excludes epochs", None, AT_LEAST_1)
    save_every: int | None = key(
        "steps between checkpoints; null: none on the way", None, AT_LEAST_1
    )
    keep_checkpoints: int | None = key("newest checkpoints to keep; null: all", None, AT_LEAST_1)
    save_at_end: bool = key("write a checkpoint after the last step", True)
    val_every: int | None = key("steps between validations; null: after the last", None, AT_LEAST_1)
    log_every: int = key(
        "steps between progress lines; metrics.jsonl gets every step", 1, AT_LEAST_1
    )
    resume: str = key(
        "no: start at step 0; auto: go on from the newest whole checkpoint of run_dir if there "
        "is one; must: fail if there is none; else: the checkpoint folder to go on from",
        "no", NOT_EMPTY,
    )  # fmt: skip

    exit_duration: float | str | None = key(
        "when the run has lasted so long, launcher included, save and end with exit code 0, in "
        "time for that; null: never", None, DURATION
    )  # fmt: skip
    hang_timeout: float | str | None = key(
        "end a run that finishes no step (or validation batch) for so long, and name the rank that "
        "hangs; the first step and a save may take four times as long; null: wait", 30.0, DURATION
    )  # fmt: skip
    max_skipped_steps: int = key(
        "steps in a row whose loss or gradient may be not finite: each is skipped, its samples "
        "written to run_dir/bad_steps; one more ends the run", 5, AT_LEAST_0
    )  # fmt: skip
    spike_threshold: float | None = key(
        "warn of a loss so many standard deviations above the median of the last 100 steps; null: "
        "never", 6.0, ABOVE_0
    )  # fmt: skip

    @property
    def saves(self) -> bool:
        """Whether the run writes checkpoints of itself."""
        return self.save_every is not None or self.save_at_end

    @property
    def exit_seconds(self) -> float | None:
        """exit_duration in seconds."""
        return None if self.exit_duration is None else seconds(self.exit_duration)

    @property
    def hang_seconds(self) -> float | None:
        """hang_timeout in seconds."""
        return None if self.hang_timeout is None else seconds(self.hang_timeout)

    def __post_init__(self) -> None:
        """One of epochs and steps; epochs=1 when neither is given."""
        super().__post_init__()
        if self.epochs is not None and self.steps is not None:
            raise UserError(
                f"train.steps={self.steps} and train.epochs={self.epochs:g} exclude each other: "
                "drop one, or set it to null"
            )
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 1.0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """What becomes of checkpoints; when they are written is under train."""

    path: ClassVar[str] = "checkpoint."
    export_hf: Literal["never", "last", "every_save"] = key(
        "write the last or every checkpoint as a Hugging Face folder too, run_dir/hf/step_N, "
        "proven equal, in a process of its own on a CPU while training goes on (or, what is still "
        "missing, when the run is resumed); train.keep_checkpoints counts for them as well",
        "never",
    )
    async_save: bool = key(
        "write checkpoints while training goes on, from a copy of the state in host memory; a "
        "crash meanwhile falls back to the checkpoint before. false: training waits, nothing is "
        "copied, and the next step begins when what was saved is on the disk", False
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(Section):
    """Where metrics go beside run_dir/metrics.jsonl, which is always written."""

    path: ClassVar[str] = "monitor."
    tensorboard: Literal["auto", True, False] = key("auto: when tensorboard is installed", "auto")
    wandb: bool = key("log to Weights & Biases (WANDB_MODE=offline works without network)", False)
    project: str = key("W&B project", "megatron_deft", NOT_EMPTY)
    experiment: str | None = key("W&B run name; null: the name of run_dir", None, NOT_EMPTY)
    peak_tflops: float | None = key(
        "dense TFLOP/s of one device in model.dtype, of which mfu is a share; null: that of a GPU "
        "by its name, for 16-bit types; on a CPU none", None, ABOVE_0
    )  # fmt: skip
    landscape_every: int = key(
        "steps between landscapes in metrics.jsonl (tokens and gradient over p and entropy, some "
        "kB each), beside those of the first and the last step; 0: none at all", 20, AT_LEAST_0
    )  # fmt: skip
