"""One training run from top to bottom: load, loop, log, validate, save."""

import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft.config import RunConfig, dump_yaml, to_dict
from megatron_deft.data.loader import Step, load_steps
from megatron_deft.data.mixture import Rows
from megatron_deft.data.sampler import Indices, epochs, full_pass
from megatron_deft.data.tokenizer import template_text
from megatron_deft.files import atomic_write
from megatron_deft.loss.attach import attach
from megatron_deft.loss.inputs import raise_on_wrong_labels
from megatron_deft.platform import device, device_name, seed_step
from megatron_deft.training import adapters, checkpointing, clock, resume
from megatron_deft.training.bad_steps import BadSteps, is_finite_loss
from megatron_deft.training.base import Base
from megatron_deft.training.checkpointing import Position
from megatron_deft.training.clock import Clock
from megatron_deft.training.data import open_data, share_of_rank
from megatron_deft.training.exports import Exports
from megatron_deft.training.hang import SLOW, HangWatch
from megatron_deft.training.loss_scale import build_loss_scale
from megatron_deft.training.metrics import MetricsLog, progress_line
from megatron_deft.training.model import (
    build_chunks,
    complete_parameters,
    prepare_heads,
    wrap_chunks,
)
from megatron_deft.training.optimizer import (
    build_optimizer,
    bytes_to_save,
    has_finite_rest,
    set_hyper_parameters,
)
from megatron_deft.training.preemption import REASONS, Preemption
from megatron_deft.training.restarts import Attempt
from megatron_deft.training.samples import first_sample, load_tokenizer
from megatron_deft.training.saving import Companions, Saver, little_room
from megatron_deft.training.schedule import learning_rate
from megatron_deft.training.spikes import Spikes, recent_losses
from megatron_deft.training.statistics import Landscape, landscape, means, reduce_sums, sums_size
from megatron_deft.training.step import StepDenominator, forward_step, path_of_loss, pipeline_pass
from megatron_deft.training.throughput import peak_tflops, throughput


def say(message: str) -> None:
    """A line for the person who runs this, once: from rank 0."""
    if dist.get_rank() == 0:
        print(message, flush=True)


class Trainer:
    """The model, optimizer and data of one rank, and the loop over steps.

    model: this rank's chunks, one unless the pipeline is virtual; ddp: the same, wrapped
    """

    def __init__(
        self,
        cfg: RunConfig,
        base: Base,
        attempt: Attempt | None = None,
        preemption: Preemption | None = None,
        watch: HangWatch | None = None,
    ) -> None:
        """Build everything; `base` is what cfg.model names, `attempt` None for the only one.

        preemption, watch: those of the whole run, in whose blocks this is; None: nobody listens
        """
        self.preemption = preemption or Preemption(cfg.train.exit_seconds)
        self.watch = watch or HangWatch(None)
        self.cfg, self.spec = cfg, base.spec
        spec = base.spec
        self._has_warned = False
        self.run_dir = Path(cfg.run_dir)
        self.attempt = attempt or Attempt(self.run_dir)
        for note in self.attempt.notes(cfg.train.resume):
            say(note)
        newest, warnings = checkpointing.find(self.attempt, cfg.train.resume)
        for warning in warnings:
            say(f"warning: {warning}")
        self.files = base.files if newest is None else newest / "hf"
        tokenizer = load_tokenizer(cfg, self.files, spec)
        self.template = template_text(tokenizer) if cfg.data.template else None
        self.watch.progress(math.inf)  # rank 0 may tokenise for days
        self.data = open_data(cfg, tokenizer, self.files)
        self.watch.progress(SLOW)
        for note in self.data.notes:
            say(note)
        if cfg.data.show_sample:
            say(first_sample(self.data.train, tokenizer))
        self.adapter = adapters.record(cfg, base)
        if newest is not None:
            for note in adapters.check_resume(newest, self.adapter, base.key):
                say(f"warning: {note}")
        self.model = build_chunks(cfg, spec)
        if newest is None or self.adapter is not None:
            found = base.load(self.model)
            if note := prepare_heads(cfg, self.model, base.key, found):
                say(note)
        self.ddp = wrap_chunks(cfg, self.model)
        self.attachment = attach(
            self.ddp,
            cfg.objective,
            vocab_size=spec.vocab_size,
            # the other reductions divide by a count first, and the upstream gradient is not 1
            grad_in_forward=None if cfg.reduction == "token" else False,
            fused_linear=cfg.loss.fused_linear,
            chunk_tokens=cfg.loss.chunk_tokens,
        )
        self.optimizer = build_optimizer(cfg, self.ddp)
        config = self.model[0].config
        self.loss_scale = build_loss_scale(cfg.model.dtype, self.optimizer, config)
        self.position = Position()
        self.base, self.license = base.name, base.license
        self.tokens: int | None = 0  # of all samples so far; None: an older run did not count
        self.landscape: Landscape | None = None  # of the last step, if it was due
        self.exports = Exports(self.run_dir, cfg.checkpoint.export_hf, cfg.train.keep_checkpoints)
        self.saver = Saver(self.run_dir, cfg.train.keep_checkpoints)
        self.denominator = StepDenominator()
        config.finalize_model_grads_func = self.denominator.finalize
        self.clock = Clock()
        config.timers = self.optimizer.config.timers = self.clock
        clock.time_head(self.model, self.clock)
        self.peak = cfg.monitor.peak_tflops or peak_tflops(device_name(), cfg.model.dtype)
        if newest is not None:
            self._resume(newest)
        # the steps that follow; made when the first is asked for
        self._steps: Iterator[Step] | None = None
        self.stopped: str | None = None  # why the run ends before its last step
        self.bad_steps = BadSteps(self.run_dir, cfg.train.max_skipped_steps)

    def _resume(self, folder: Path) -> None:
        self.position, manifest, notes = checkpointing.load(
            self.cfg, self.spec, folder, self.model, self.optimizer
        )
        self.base = manifest.get("base", self.base)
        self.license = manifest.get("license", self.license)
        self.tokens = manifest.get("tokens")
        self.loss_scale.load(manifest.get("loss_scale") or {})
        now, data = to_dict(self.cfg), self.data.train.fingerprint
        for note in [*notes, *resume.notes(folder.name, manifest, now, data)]:
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
            self.attempt.begin()
            with atomic_write(self.run_dir / checkpointing.CONFIG) as handle:
                handle.write(dump_yaml(cfg))
            if self.position.step:
                self.exports.resumed(self.files.parent, is_last=False)
        say(
            f"training with {self.attachment.objective.spec}, reduction {cfg.reduction}: steps "
            f"{self.position.step + 1} to {total}, {cfg.train.global_batch} samples each"
        )
        say(adapters.trained_numbers(cfg, self.spec))
        say(f"loss from {path_of_loss(self.attachment, self.model)}")
        if self.peak is not None:
            say(f"mfu: of {self.peak:g} TFLOP/s for each {device_name()}")
        needed = bytes_to_save(cfg, self.optimizer)
        if cfg.train.saves and (warning := little_room(self.run_dir, needed)):
            say(f"warning: {warning}")
        log = None
        if dist.get_rank() == 0:
            log = MetricsLog(self.run_dir, cfg.monitor, self.position.step, to_dict(cfg))
        metrics: dict[str, float] = {}
        try:
            metrics = self._loop(log)
        finally:
            self._steps = None  # and with it the processes that read ahead
            if log is not None:
                log.close()
        return metrics

    def _loop(self, log: MetricsLog | None) -> dict[str, float]:
        """Steps, and what is due after each; `log` is rank 0's."""
        cfg, total = self.cfg.train, self.data.total_steps
        spikes = None
        if log is not None:
            spikes = Spikes(cfg.spike_threshold, recent_losses(log.path))
        metrics: dict[str, float] = {}
        begin, first = time.perf_counter(), self.position.step
        is_save_due = False
        self.preemption.begin_steps()
        self.watch.progress(SLOW)
        while self.position.step < total and self.stopped is None:
            metrics = self.step()
            step = self.position.step
            self.watch.progress(step=step)
            # A run that may end here by its bad steps keeps what was saved before them.
            self._poll_save(wait_for_it=self.bad_steps.in_a_row > 0)
            metrics |= self.saver.take_seconds()
            if self._is_due(cfg.val_every, step) and self.data.val_rows and not self.stopped:
                metrics |= self.validate()
            if log is not None and spikes is not None:
                height, warning = spikes.look(step, metrics["loss"])
                if height is not None:
                    metrics["loss_spike"] = height
                if warning is not None:
                    say(f"warning: {warning}")
                log.log(step, metrics, self.landscape)
                self.exports.poll()
            if step % cfg.log_every == 0 or step == total:
                pace = (time.perf_counter() - begin) / (step - first)
                say(progress_line(metrics, step, total, pace))
            self.bad_steps.stop_if_too_many(step)
            is_save_due |= cfg.save_every is not None and step % cfg.save_every == 0
            # Weights that give no loss any more are no reason to drop a checkpoint: wait and see.
            if is_save_due and self.bad_steps.in_a_row == 0:
                self.save(wait_for_it=not self.cfg.checkpoint.async_save)
                is_save_due = False
            elif self.stopped or (step == total and (is_save_due or cfg.save_at_end)):
                self.save()
        self._poll_save(wait_for_it=True)
        return metrics

    def _is_due(self, every: int | None, step: int) -> bool:
        return step == self.data.total_steps or (every is not None and step % every == 0)

    def step(self) -> dict[str, float]:
        """One optimizer step on the next global batch; the metrics, the same on every rank."""
        self.clock.restart()
        self.clock.start(clock.STEP)
        cfg, data, position = self.cfg, self.data, self.position
        number = position.step + 1
        if self._steps is None:
            batches = data.batches(position.consumed, cfg.train.global_batch)
            self._steps = self._load(data.train, batches)
        with self.clock.part(clock.DATA):
            work = next(self._steps)
        lr = learning_rate(cfg.optim, data.total_steps, number)
        set_hyper_parameters(self.optimizer, cfg.optim, lr)
        seed_step(cfg.seed, number)
        for chunk in self.ddp:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        vocab_size = self.spec.vocab_size if self._has_landscape(number) else None
        heads = cfg.model.mtp_layers
        parts = self._forward_backward(work, forward_only=False, landscape_vocab=vocab_size)
        size = sums_size(vocab_size is not None, heads)
        total, raised = reduce_sums(parts, size, self._flags())
        metrics = means(total, heads)
        self.landscape = None if vocab_size is None else landscape(total, vocab_size)
        has_bad_gradient, *reasons = raised.tolist()
        self._may_stop(number, reasons)
        self.optimizer.may_step = is_finite_loss(metrics) and not has_bad_gradient
        self.loss_scale.is_loss_finite = is_finite_loss(metrics)
        with self.clock.part(clock.OPTIMIZER):
            is_done, grad_norm, _ = self.optimizer.step()
        consumed = position.consumed + cfg.train.global_batch
        self.position = Position(number, consumed, position.skipped + (not is_done))
        skipped = self.position.skipped - self.loss_scale.overflows
        metrics |= {"grad_norm": float(grad_norm or 0.0), "skipped": skipped}
        if is_done:
            self.bad_steps.good()
        elif grad_norm is not None or not is_finite_loss(metrics):  # else the loss scale was high
            self._keep_bad_step(number, metrics, position)
        self.loss_scale.stop_if_stuck(number)
        metrics |= self.loss_scale.metrics()
        if metrics["kept_tokens"] == 0 and not self._has_warned:
            self._has_warned = True
            say(f"warning: step {number}: {self.attachment.objective.spec} keeps no token at all")
        self.clock.stop(clock.STEP)
        measured = clock.measurements(self.clock.read())
        self.tokens = None if self.tokens is None else self.tokens + work.tokens
        metrics |= {
            "lr": lr,
            "tokens": work.tokens,
            "samples": self.position.consumed,
            "epoch": epochs(data.stream, self.position.consumed),
        }
        return metrics | measured | throughput(
            self.spec, work.lengths, metrics["kept_tokens"], measured["step_seconds"],
            dist.get_world_size(), self.peak, adapters.adapters_of(cfg), heads,
        )  # fmt: skip

    def _has_landscape(self, step: int) -> bool:
        every = self.cfg.monitor.landscape_every
        return every > 0 and (step in (1, self.data.total_steps) or step % every == 0)

    def _flags(self) -> Tensor:
        """What every rank must learn of this one, bool [1 + len(REASONS)]: whether a gradient is
        not finite that is in no norm, and why the run should stop."""
        flags = torch.zeros(1 + len(REASONS), dtype=torch.bool, device=device())
        flags[0] = ~has_finite_rest(self.ddp)
        for number, is_raised in enumerate(self.preemption.flags(), 1):
            if is_raised:  # a copy of the list would wait for the device
                flags[number] = True
        return flags

    def _may_stop(self, step: int, reasons: list[bool]) -> bool:
        """Whether any rank wants to, by what all have raised; the last step ends the run anyway."""
        why = next((why for why, on in zip(REASONS, reasons, strict=True) if on), None)
        if step < self.data.total_steps:
            self.stopped = why
        return why is not None

    def _keep_bad_step(self, step: int, metrics: dict[str, float], position: Position) -> None:
        raise_on_wrong_labels()
        rows = self.data.stream.take(position.consumed, self.cfg.train.global_batch)
        warning = self.bad_steps.bad(step, metrics, rows)
        if dist.get_rank() == 0:
            self.bad_steps.write(step, self.data.train, rows)
        say(f"warning: {warning}")

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The objective and its statistics over the validation data, named val_*.

        Nothing when the run is to stop meanwhile: part of the data would be another figure.
        """
        assert self.data.val is not None
        for chunk in self.ddp:
            chunk.eval()
        total = torch.zeros((), dtype=torch.float64)
        batches = full_pass(self.data.val_rows, self.cfg.train.global_batch)
        heads = self.cfg.model.mtp_layers
        for work in self._load(self.data.val, batches):
            parts = self._forward_backward(work, forward_only=True)
            sums, raised = reduce_sums(parts, sums_size(False, heads), self._flags())
            total = total + sums.cpu()
            self.watch.progress()
            if self._may_stop(self.position.step, raised.tolist()[1:]):
                return {}
        return {f"val_{name}": value for name, value in means(total, heads).items()
                if "_histogram_" not in name}  # fmt: skip

    def _load(self, rows: Rows, batches: Iterable[Indices]) -> Iterator[Step]:
        return load_steps(rows, share_of_rank(self.cfg, rows), batches, self.cfg.data.workers)

    def forward_step(self, validating: bool, landscape_vocab: int | None) -> Any:
        """What a micro-batch runs: see megatron_deft.training.step."""
        return forward_step(
            self.attachment, self.cfg.reduction, self.denominator, validating, landscape_vocab
        )

    def _forward_backward(
        self, work: Step, forward_only: bool, landscape_vocab: int | None = None
    ) -> list[dict[str, Any]]:
        """Run one global batch through the pipeline; its micro-batches' sums (see statistics)."""
        self.denominator.clear()
        step = self.forward_step(forward_only, landscape_vocab)
        return pipeline_pass(step, self.ddp, work, self.cfg.train.micro_batch, forward_only)

    def save(self, wait_for_it: bool = True) -> None:
        """Write a checkpoint of where the run stands, when the one before is whole."""
        self._poll_save(wait_for_it=True)
        self.watch.progress(SLOW)
        complete_parameters(self.cfg, self.ddp)
        fields = {
            "spec": self.spec.to_json(),
            "adapter": self.adapter,
            "objective": self.attachment.objective.spec,
            "base": self.base,
            "license": self.license,
            "tokens": self.tokens,
            "loss_scale": self.loss_scale.state(),
            "data": self.data.train.fingerprint,
            "config": to_dict(self.cfg),
        }
        companions = Companions(self.files, self.template, fields)
        self.saver.start(self.model, self.optimizer, self.position, companions, not wait_for_it)
        self._poll_save(wait_for_it)

    def _poll_save(self, wait_for_it: bool = False) -> None:
        """See to the checkpoint that is on its way, if there is one; the ranks agree on it."""
        if wait_for_it:
            self.watch.progress(SLOW)
        saved = self.saver.poll(wait_for_it, self.exports.needed())
        self.watch.progress()
        if saved is None:
            return
        self.preemption.saved(saved.seconds)
        self.files = saved.folder / "hf"
        waited = f", training waited {saved.waited:.1f} s" * self.cfg.checkpoint.async_save
        say(f"saved {saved.folder} in {saved.seconds:.1f} s{waited}")
        for warning in filter(None, (saved.warning, little_room(self.run_dir, saved.bytes))):
            say(f"warning: {warning}")
        if dist.get_rank() == 0:
            self.exports.saved(saved.folder, saved.step == self.data.total_steps)
