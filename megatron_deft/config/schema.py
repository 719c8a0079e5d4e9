"""What a run is: every key with its type, default, unit and legal values, and which runs can be.

A section that exists holds legal values: types and ranges are checked when it is made. What depends
on the number of processes or on the model is checked by `RunConfig.validate` (config/checks.py).
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_type_hints

from megatron_deft.config import checks
from megatron_deft.config.checks import ModelShape
from megatron_deft.config.values import (
    ABOVE_0,
    ABOVE_0_EACH,
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    FRACTION,
    NAMES,
    NOT_EMPTY,
    SEED,
    checked,
    key,
)
from megatron_deft.errors import UserError


class Section:
    """A group of keys; `path` is what stands before them (`optim.`)."""

    path: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check every key's type and range. Errors: UserError naming the first that is wrong."""
        hints = get_type_hints(type(self))
        for declaration in fields(self):  # type: ignore[arg-type]
            name = declaration.name
            hint, value = hints[name], getattr(self, name)
            if isinstance(hint, type) and issubclass(hint, Section):
                assert isinstance(value, hint), f"{name} must be a {hint.__name__}"
            else:
                value = checked(self.path + name, declaration, hint, value)
                object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The weights training starts from (load or hf), and the precision it runs in."""

    path: ClassVar[str] = "model."
    load: str | None = key(
        "folder written by `megatron-deft convert import` or by training", None, NOT_EMPTY
    )
    hf: str | None = key(
        "Hugging Face folder, or a model in the local cache by its name; takes the place of load. "
        "It is loaded as `convert import` would have converted it, without the proof",
        None, NOT_EMPTY,
    )  # fmt: skip
    dtype: Literal["fp32", "bf16"] = key(
        "precision of weights and activations; gradients and optimizer state are fp32 in both",
        "bf16",
    )
    attention_dropout: float = key("probability of dropping an attention weight", 0.0, BELOW_1)
    hidden_dropout: float = key("probability of dropping a residual-branch output", 0.0, BELOW_1)
    recompute: Literal["none", "full"] = key(
        "activations kept for the backward pass: all, or each layer's input alone (less memory, "
        "about a third more compute)", "none"
    )  # fmt: skip

    def __post_init__(self) -> None:
        """One of load and hf."""
        super().__post_init__()
        if (self.load is None) == (self.hf is None):
            given = "neither is set" if self.load is None else f"{self.load} and {self.hf}"
            raise UserError(f"model.load and model.hf: {given}; set one of them, the other is null")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How the processes share the model; the rest of them is data parallel."""

    path: ClassVar[str] = "parallel."
    tensor: int = key(
        "processes that share each layer's matrices and the vocabulary", 1, AT_LEAST_1
    )
    pipeline: int = key("processes that share the layers, in consecutive blocks", 1, AT_LEAST_1)
    virtual_pipeline: int | None = key(
        "blocks of layers that each of those processes holds, run in turns (interleaved schedule); "
        "null or 1: one", None, AT_LEAST_1
    )  # fmt: skip
    expert: int = key("data-parallel processes that share the experts of each layer", 1, AT_LEAST_1)
    context: int = key(
        "processes that share each sequence: its keys and values are gathered, the rest is split",
        1, AT_LEAST_1
    )  # fmt: skip
    sequence: bool = key("shard norms and dropout over the sequence among the tensor ranks", False)
    distributed_optimizer: bool = key("shard optimizer state among the data-parallel ranks", True)
    overlap_grad_reduce: bool = key("reduce gradients while the backward pass still runs", False)
    vocab_pad_multiple: int = key(
        "the vocabulary is padded to a multiple of this times parallel.tensor", 128, AT_LEAST_1
    )

    @property
    def chunks(self) -> int:
        """Blocks of layers that one process holds."""
        return self.virtual_pipeline or 1


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What is trained on and how rows become tokens."""

    path: ClassVar[str] = "data."
    train_sets: tuple[str, ...] = key(
        "training data that `megatron-deft prepare` tokenised: folders; or, for pretraining, what "
        "stands before .bin and .idx of megatron-core's indexed datasets", (), NAMES
    )  # fmt: skip
    train_weights: tuple[float, ...] = key(
        "share of each of train_sets in what is trained on, of any sum; empty: every sample once "
        "an epoch, whichever set it is in", (), ABOVE_0_EACH
    )  # fmt: skip
    val_sets: tuple[str, ...] = key("validation data, likewise", (), NAMES)
    split: tuple[float, float] | None = key(
        "pretraining: shares of each set's documents to train and to validate on; null: all of "
        "train_sets to train on", None, ABOVE_0
    )  # fmt: skip
    train_files: tuple[str, ...] = key(
        "training files, parquet or JSONL, in the place of train_sets; they are tokenised when the "
        "run starts, into run_dir/data", (), NAMES
    )  # fmt: skip
    val_files: tuple[str, ...] = key("validation files, likewise", (), NAMES)
    format: Literal["auto", "columns", "messages"] = key(
        "rows of files hold a prompt and a response column, or a list of chat messages", "auto"
    )
    prompt_key: str = key("column of the prompt", "extra_info", NOT_EMPTY)
    response_key: str = key("column of the response", "extra_info", NOT_EMPTY)
    prompt_dict_keys: tuple[str, ...] = key(
        "keys to follow inside the prompt column; null: the column is text", ("question",)
    )
    response_dict_keys: tuple[str, ...] = key(
        "keys to follow inside the response column; null: the column is text", ("answer",)
    )
    messages_key: str = key("column of the chat messages (format messages)", "messages", NOT_EMPTY)
    tools_key: str = key(
        "column of the tools that the messages may call, where there is one", "tools", NOT_EMPTY
    )
    template: str | None = key(
        "chat template of files: chatml, llama3, qwen, deepseek, gemma, or a file; null: the "
        "tokenizer's own. It becomes that of the trained model", None, NOT_EMPTY
    )  # fmt: skip
    max_length: int = key(
        "longest sample in tokens, prompt and response together; with pack=true also how many "
        "positions a row has, and in pretraining how many it always has", 2048, AT_LEAST_1
    )  # fmt: skip
    truncation: Literal["right", "error", "drop"] = key(
        "a longer sample of files is cut at its end, stops the run, or is left out", "right"
    )
    bad_rows: Literal["error", "drop"] = key(
        "a row of files that is broken (no JSON, null content, roles out of order, ...) stops the "
        "run, or is left out and counted", "error"
    )  # fmt: skip
    use_original_prompt: bool = key("the prompt is whole as it is: apply no chat template", False)
    pack: bool = key(
        "put samples together into rows of max_length, so that hardly any position is padding; no "
        "sample sees another. train.global_batch and micro_batch then count rows", False
    )  # fmt: skip
    show_sample: bool = key("print the first sample with its trained tokens marked", True)
    shuffle: bool = key("a new order each epoch, drawn from seed", True)
    val_max_samples: int | None = key(
        "validate on the first so many samples, or rows of running text; null: all",
        None,
        AT_LEAST_1,
    )
    workers: int = key(
        "processes of each rank that read ahead; 0: the rank reads for itself, which is fast "
        "enough for any disk that is not", 0, AT_LEAST_0
    )  # fmt: skip
    prepare_workers: int | None = key(
        "processes that tokenise train_files; null: as many as there are cores", None, AT_LEAST_1
    )

    def __post_init__(self) -> None:
        """Sets or files, and what goes with each."""
        super().__post_init__()
        for sets, files in (("train_sets", "train_files"), ("val_sets", "val_files")):
            if getattr(self, sets) and getattr(self, files):
                raise UserError(
                    f"data.{sets} and data.{files} are both set: `megatron-deft prepare` makes a "
                    "set of files; name sets alone, or files alone"
                )
        if self.train_weights and len(self.train_weights) != len(self.train_sets):
            raise UserError(
                f"data.train_weights={list(self.train_weights)}: expected one number for each of "
                f"the {len(self.train_sets)} data.train_sets"
            )
        if self.split is None:
            return
        for name in ("train_files", "val_sets", "val_files"):
            if getattr(self, name):
                raise UserError(
                    f"data.split={list(self.split)} and data.{name} exclude each other: it cuts "
                    "validation data off data.train_sets; set one of them to null"
                )


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


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(Section):
    """Where metrics go beside run_dir/metrics.jsonl, which is always written."""

    path: ClassVar[str] = "monitor."
    tensorboard: Literal["auto", True, False] = key("auto: when tensorboard is installed", "auto")
    wandb: bool = key("log to Weights & Biases (WANDB_MODE=offline works without network)", False)
    project: str = key("W&B project", "megatron_deft", NOT_EMPTY)
    experiment: str | None = key("W&B run name; null: the name of run_dir", None, NOT_EMPTY)
    landscape_every: int = key(
        "steps between landscapes in metrics.jsonl (tokens and gradient over p and entropy, some "
        "kB each), beside those of the first and the last step; 0: none at all", 20, AT_LEAST_0
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """How the loss is computed; what it is does not change."""

    path: ClassVar[str] = "loss."
    fused_linear: Literal["auto", True, False] = key(
        "make the loss from hidden states and output layer, a chunk of logits at a time and of "
        "trained tokens alone; auto: with an output layer that allows it and is not tiny", "auto"
    )  # fmt: skip
    chunk_tokens: int | None = key(
        "rows of logits that exist at a time; null: 40 MiB of them on the CPU; on a GPU 1 GiB, and "
        "at least 4096 rows", None, AT_LEAST_1
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """A training run, whole."""

    objective: str = key("training objective; `megatron-deft objectives` lists them", "deft")
    reduction: Literal["token", "micro_batch", "sample"] = key(
        "mean over the trained tokens of the global batch; or per micro-batch and rank, then over "
        "those (as the released trainers do); or per sample, then over samples", "token"
    )  # fmt: skip
    seed: int = key("of data order, dropout and initialisation", 1234, SEED)
    run_dir: str = key("folder of checkpoints, metrics and logs; made if absent", legal=NOT_EMPTY)
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig
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
