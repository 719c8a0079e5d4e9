"""One training run from top to bottom: load, loop, log, validate, save."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_deft.config import RunConfig, dump_yaml, to_dict
from megatron_deft.data.chat import render_sample
from megatron_deft.data.dataset import Batch, Dataset, collate, load_dataset
from megatron_deft.data.sampler import Indices, Stream, full_pass, padded_length, rank_share
from megatron_deft.errors import UserError
from megatron_deft.files import atomic_write
from megatron_deft.loss.attach import Attachment, attach
from megatron_deft.loss.inputs import raise_on_wrong_labels
from megatron_deft.loss.reduction import reduce_loss
from megatron_deft.models.families import ModelSpec
from megatron_deft.platform import device
from megatron_deft.training import checkpointing
from megatron_deft.training.base import Base
from megatron_deft.training.checkpointing import Position
from megatron_deft.training.exports import Exports
from megatron_deft.training.metrics import MetricsLog, progress_line
from megatron_deft.training.model import build_chunks, wrap_chunks
from megatron_deft.training.optimizer import build_optimizer, set_hyper_parameters
from megatron_deft.training.schedule import learning_rate, warmup_length
from megatron_deft.training.statistics import means, reduce_sums, token_sums

# What may change when a run is resumed, beside train.*: how it is laid out, watched and saved.
FREE_KEYS = (
    "run_dir", "parallel", "monitor", "model.load", "model.hf", "checkpoint", "data.show_sample"
)  # fmt: skip
LENGTH_MULTIPLE = 8  # batches are padded to a multiple of this: what GPUs' matrix units want


def say(message: str) -> None:
    """A line for the person who runs this, once: from rank 0."""
    if dist.get_rank() == 0:
        print(message, flush=True)


@dataclass(frozen=True)
class Data:
    """The run's samples and the order they come in."""

    train: Dataset
    val: Dataset | None
    stream: Stream
    total_steps: int


def load_tokenizer(folder: Path, spec: ModelSpec) -> Any:
    """The tokenizer among a model's files. Errors: UserError when the model is too small for it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: no tokenizer that transformers can read ({reason}): put the model's "
            "tokenizer files into the Hugging Face folder and import it again"
        ) from None
    if len(tokenizer) > spec.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model {spec.vocab_size}: "
            "resize the model's embeddings before converting it, or use its own tokenizer"
        )
    return tokenizer


def load_data(cfg: RunConfig, tokenizer: Any) -> Data:
    """Read and tokenise the training and validation files; every rank reads all of them."""
    first = dist.get_rank() == 0
    train = load_dataset(cfg.data, cfg.data.train_files, tokenizer, progress=first)
    val = None
    if cfg.data.val_files:
        val = load_dataset(cfg.data, cfg.data.val_files, tokenizer, cfg.data.val_max_samples)
    for name, dataset in (("data.train_files", train), ("data.val_files", val)):
        if dataset is not None:
            say(f"{name}: {len(dataset)} samples ({dataset.format})")
            for note in dataset.notes:
                say(f"  {note}")
    stream = Stream(len(train), cfg.seed, cfg.data.shuffle)
    steps = cfg.train.steps
    if steps is None:
        assert cfg.train.epochs is not None
        steps = stream.steps(cfg.train.epochs, cfg.train.global_batch)
    warmup_length(cfg.optim, steps)  # refuse an impossible schedule before the first step
    return Data(train, val, stream, steps)


def show_sample(data: Data, tokenizer: Any) -> None:
    """Print the first sample with its trained tokens marked."""
    batch = collate(data.train.take([0]), int(data.train.lengths[0]))
    color = sys.stdout.isatty()
    text = render_sample(tokenizer, batch["tokens"][0], batch["labels"][0], color)
    say(f"first sample (trained tokens {'in green' if color else 'between ⟦ and ⟧'}):\n{text}\n")


class Trainer:
    """The model, optimizer and data of one rank, and the loop over steps.

    model: this rank's chunks, one unless the pipeline is virtual; ddp: the same, wrapped
    """

    def __init__(self, cfg: RunConfig, base: Base) -> None:
        """Build everything; `base` is what cfg.model names."""
        self.cfg, self.spec = cfg, base.spec
        spec = base.spec
        self._has_warned = False
        self.run_dir = Path(cfg.run_dir)
        resume, warnings = checkpointing.find(self.run_dir, cfg.train.resume)
        for warning in warnings:
            say(f"warning: {warning}")
        self.files = base.files if resume is None else resume / "hf"
        tokenizer = load_tokenizer(self.files, spec)
        self.data = load_data(cfg, tokenizer)
        if cfg.data.show_sample:
            show_sample(self.data, tokenizer)

        self.model = build_chunks(cfg, spec)
        if resume is None:
            base.load(self.model)
        self.ddp = wrap_chunks(cfg, self.model)
        self.attachment = attach(
            self.ddp,
            cfg.objective,
            vocab_size=spec.vocab_size,
            # the other reductions divide by a count first, and the upstream gradient is not 1
            grad_in_forward=None if cfg.reduction == "token" else False,
        )
        self.optimizer = build_optimizer(cfg, self.ddp)
        self.position = Position()
        self.base, self.license = base.name, base.license
        self.tokens: int | None = 0  # of all samples so far; None: an older run did not count
        self.exports = Exports(self.run_dir, cfg.checkpoint.export_hf, cfg.train.keep_checkpoints)
        if resume is not None:
            self._resume(resume)

    def _resume(self, folder: Path) -> None:
        self.position, manifest, notes = checkpointing.load(
            self.cfg, self.spec, folder, self.model, self.optimizer
        )
        self.base = manifest.get("base", self.base)
        self.license = manifest.get("license", self.license)
        self.tokens = manifest.get("tokens")
        if manifest["samples"] != len(self.data.train):
            notes.append(
                f"the data changed: {manifest['samples']} samples when {folder.name} was saved, "
                f"{len(self.data.train)} now; the order of samples is another one"
            )
        notes += _changes(manifest["config"], to_dict(self.cfg))
        for note in notes:
            say(f"warning: {note}")
        say(f"resumed from {folder}: step {self.position.step}")

    def run(self) -> dict[str, float]:
        """Train to the last step. Returns the metrics of the last step of the run."""
        cfg, total = self.cfg, self.data.total_steps
        if self.position.step >= total:
            say(f"step {self.position.step} of {total} is done: nothing is left to train")
            if dist.get_rank() == 0:
                self.exports.resumed(self.files.parent, is_last=True)
            return {}
        if dist.get_rank() == 0:
            for note in checkpointing.clear_the_way(self.run_dir, self.position):
                say(f"warning: {note}")
            with atomic_write(self.run_dir / "config.yaml") as handle:
                handle.write(dump_yaml(cfg))
            if self.position.step:
                self.exports.resumed(self.files.parent, is_last=False)
        say(
            f"training with {self.attachment.objective.spec}, reduction {cfg.reduction}: steps "
            f"{self.position.step + 1} to {total}, {cfg.train.global_batch} samples each"
        )
        log = None
        if dist.get_rank() == 0:
            log = MetricsLog(self.run_dir, cfg.monitor, self.position.step, to_dict(cfg))
        metrics: dict[str, float] = {}
        begin, first = time.perf_counter(), self.position.step
        try:
            while self.position.step < total:
                metrics = self.step()
                step = self.position.step
                if self._is_due(cfg.train.val_every, step) and self.data.val is not None:
                    metrics |= self.validate(self.data.val)
                if log is not None:
                    log.log(step, metrics)
                    self.exports.poll()
                if step % cfg.train.log_every == 0 or step == total:
                    pace = (time.perf_counter() - begin) / (step - first)
                    say(progress_line(metrics, step, total, pace))
                save_now = cfg.train.save_every and step % cfg.train.save_every == 0
                if save_now or (step == total and cfg.train.save_at_end):
                    self.save()
        finally:
            if log is not None:
                log.close()
        return metrics

    def _is_due(self, every: int | None, step: int) -> bool:
        return step == self.data.total_steps or (every is not None and step % every == 0)

    def step(self) -> dict[str, float]:
        """One optimizer step on the next global batch; the metrics, the same on every rank."""
        begin = time.perf_counter()
        cfg, data, position = self.cfg, self.data, self.position
        number = position.step + 1
        batch = data.stream.take(position.consumed, cfg.train.global_batch)
        lr = learning_rate(cfg.optim, data.total_steps, number)
        set_hyper_parameters(self.optimizer, cfg.optim, lr)
        for chunk in self.ddp:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        metrics = means(self._forward_backward(data.train, batch, forward_only=False))
        _, grad_norm, _ = self.optimizer.step()
        self.position = Position(number, position.consumed + len(batch))
        metrics["grad_norm"] = float(grad_norm or 0.0)
        self._stop_if_not_finite(metrics, number)
        if metrics["kept_tokens"] == 0 and not self._has_warned:
            self._has_warned = True
            say(f"warning: step {number}: {self.attachment.objective.spec} keeps no token at all")
        seconds = time.perf_counter() - begin
        tokens = int(data.train.lengths[batch].sum())
        self.tokens = None if self.tokens is None else self.tokens + tokens
        return metrics | {
            "lr": lr,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "samples": self.position.consumed,
            "epoch": data.stream.epochs(self.position.consumed),
        }

    def _stop_if_not_finite(self, metrics: dict[str, float], step: int) -> None:
        for name in ("loss", "grad_norm"):
            value = metrics[name]
            if name == "loss" and metrics["kept_tokens"] == 0:
                continue  # a mean of nothing
            if value != value or abs(value) == float("inf"):
                raise_on_wrong_labels()
                raise UserError(
                    f"step {step}: {name} is {value}; stopped before this step was saved: "
                    "lower optim.lr, look at the samples of this step, or train in fp32"
                )

    @torch.no_grad()
    def validate(self, dataset: Dataset) -> dict[str, float]:
        """The objective and its statistics over all of `dataset`, named val_*."""
        for chunk in self.ddp:
            chunk.eval()
        total = torch.zeros((), dtype=torch.float64)
        for batch in full_pass(len(dataset), self.cfg.train.global_batch):
            total = total + self._forward_backward(dataset, batch, forward_only=True).cpu()
        return {f"val_{name}": value for name, value in means(total).items()
                if not name.startswith("gate_histogram")}  # fmt: skip

    def _forward_backward(self, dataset: Dataset, batch: Indices, forward_only: bool) -> Tensor:
        """Run one global batch through the pipeline; the sums over all ranks (see statistics)."""
        cfg = self.cfg
        multiple = LENGTH_MULTIPLE * (cfg.parallel.tensor if cfg.parallel.sequence else 1)
        length = padded_length(dataset.lengths, batch, multiple)
        rows = rank_share(
            batch,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            cfg.train.micro_batch,
        )
        parts = get_forward_backward_func()(
            forward_step_func=forward_step(self.attachment, cfg.reduction, forward_only),
            data_iterator=[_micro_batches(dataset, rows, length) for _ in self.ddp],
            model=self.ddp,
            num_microbatches=len(rows),
            seq_length=length,
            micro_batch_size=cfg.train.micro_batch,
            forward_only=forward_only,
        )
        return reduce_sums(parts, device())

    def save(self) -> Path:
        """Write a checkpoint of where the run stands."""
        begin = time.perf_counter()
        folder = checkpointing.save(
            self.run_dir,
            self.model,
            self.optimizer,
            self.position,
            self.files,
            {
                "spec": self.spec.to_json(),
                "objective": self.attachment.objective.spec,
                "base": self.base,
                "license": self.license,
                "tokens": self.tokens,
                "samples": len(self.data.train),
                "config": to_dict(self.cfg),
            },
            self.cfg.train.keep_checkpoints,
            self.exports.needed(),
        )
        self.files = folder / "hf"
        say(f"saved {folder} in {time.perf_counter() - begin:.1f} s")
        if dist.get_rank() == 0:
            self.exports.saved(folder, self.position.step == self.data.total_steps)
        return folder


def _micro_batches(dataset: Dataset, rows: Indices, length: int) -> Iterator[Batch]:
    for indices in rows:
        batch = collate(dataset.take(indices), length)
        yield {name: tensor.to(device(), non_blocking=True) for name, tensor in batch.items()}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What of a run's configuration is not as it was when the checkpoint was saved, line by line.

    How a run is laid out, watched and saved may change freely; what it computes is named.
    """
    notes = []
    for key, value in now.items():
        name, old = prefix + key, before.get(key)
        if name in FREE_KEYS or (name.startswith("train.") and name != "train.global_batch"):
            continue
        if isinstance(value, Mapping):
            notes += _changes(old or {}, value, f"{name}.")
        elif old != value:
            order = "; samples come in another order" if name in ("seed", "data.shuffle") else ""
            notes.append(f"{name} is {value} now and was {old}{order}")
    return notes


def forward_step(
    attachment: Attachment, reduction: str, validating: bool = False
) -> Callable[..., Any]:
    """megatron-core's forward step: one micro-batch through this stage, and its loss function.

    validating: a micro-batch of nothing but filler, which completes the last global batch, does not
    count as one of the micro-batches that reduction="micro_batch" averages.
    """

    def loss_function(loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        statistics = attachment.statistics
        assert statistics is not None
        numerator, denominator = reduce_loss(loss, statistics.keep, reduction)
        if validating and reduction == "micro_batch":
            denominator = statistics.valid.any().long()
        sums = token_sums(statistics, numerator, denominator)
        return numerator, denominator.int(), {"sums": sums}

    def run(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)
        output = model(
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"],
            loss_mask=(batch["labels"] >= 0).float(),
        )  # fmt: skip
        return output, loss_function

    return run
