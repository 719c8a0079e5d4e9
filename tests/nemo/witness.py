"""A witness of NeMo's training: its gradients and metrics, and what the float64 oracle says."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_deft.loss.metrics import METRICS
from tests.oracle import loss_and_grad

VOCAB = 301


@dataclass
class Step:
    """What NeMo found in a step, and the oracle's expectation; losses on the last stage alone."""

    is_last: bool
    reduced: float
    loss: float
    metrics: dict[str, float]
    found: dict[str, Tensor]
    expected: dict[str, Tensor]
    logged: dict[str, float] = field(default_factory=dict)


class Witness(pl.Callback):
    """Keeps the batches and gradients of every training step, and what the oracle says of them."""

    def __init__(self, spec: str, reduction: str = "token") -> None:
        self.spec, self.reduction = spec, reduction
        self.batches: list[dict[str, Tensor]] = []
        self.steps: list[Step] = []
        self.validations = 0
        self.weights: list[Tensor] = []  # of one parameter, after each step but the last
        self.end: dict[str, Tensor] = {}  # all weights, after the training

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        model_parallel_cuda_manual_seed(1)  # which NeMo does where it counts a GPU

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 0:  # not resumed
            _draw(pl_module)

    def on_megatron_microbatch_start(self, step: Any, batch: Any) -> None:
        """As the data are; the objective's callback comes later."""
        if not step.forward_only:
            self.batches.append({k: v.clone() for k, v in batch.items() if v is not None})

    def on_megatron_step_end(self, step: Any, reduced: Tensor) -> None:
        if step.forward_only:
            return
        module = step.model
        while hasattr(module, "module"):
            module = module.module
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        loss, metrics, gradients = self._oracle(module, list(named.values()))
        self.steps.append(
            Step(
                parallel_state.is_pipeline_last_stage(),
                float(reduced),
                loss,
                metrics,
                {name: p.main_grad.clone() for name, p in named.items()},
                dict(zip(named, gradients, strict=True)),
            )
        )
        self.weights.append(next(reversed(named.values())).detach().clone())
        self.batches.clear()

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        self.steps[-1].logged = _logged(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """What is validated leaves the metrics as the last training step logged them."""
        assert "val_loss" in trainer.callback_metrics
        assert _logged(trainer) == self.steps[-1].logged
        self.validations += 1

    def _oracle(
        self, module: Any, parameters: list[Tensor]
    ) -> tuple[float, dict[str, float], list[Tensor]]:
        """The token mean, or mean of the micro-batches' means, in float64 down to the logits.

        Returns the token means of loss and metrics, and the gradients, of all data ranks.
        """
        passes = [_forward(module, batch) for batch in self.batches]
        outputs = [output for output, _ in passes]
        entries = [entry for _, entry in passes if entry is not None]
        sums = torch.zeros(2 + len(METRICS), dtype=torch.float64)
        if parallel_state.is_pipeline_last_stage():
            parts = [self._loss(*pair) for pair in zip(outputs, self.batches, strict=True)]
            sums = _added(torch.stack([part for _, part in parts]).sum(0))
            ranks = parallel_state.get_data_parallel_world_size()
            micro_batches = [float(part[1]) * len(parts) * ranks for _, part in parts]
            means = micro_batches if self.reduction == "micro_batch" else [sums[1]] * len(parts)
            upstream = [(grad / n).float() for (grad, _), n in zip(parts, means, strict=True)]
        else:
            upstream = [_received(output, _next()) for output in outputs]
        gradients = torch.autograd.grad(
            outputs,
            [*parameters, *entries],
            [u.view_as(o) for u, o in zip(upstream, outputs, strict=True)],
        )
        for gradient in gradients[len(parameters) :]:
            dist.send(gradient.contiguous(), _previous())
        dist.broadcast(
            sums,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            parallel_state.get_pipeline_model_parallel_group(),
        )
        loss, *metrics = (float(value / sums[1]) for value in (sums[0], *sums[2:]))
        found = dict(zip(METRICS, metrics, strict=True))
        return loss, found, [_added(gradient) for gradient in gradients[: len(parameters)]]

    def _loss(self, logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Gradient of the sum, and sums over the kept tokens: loss, their number, METRICS."""
        logits = logits.detach().flatten(0, 1)
        labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100).flatten()
        ones = torch.ones_like(labels, dtype=torch.float64)
        loss, grad, keep, stats = loss_and_grad(self.spec, logits, labels, VOCAB, ones)
        hit = logits[:, :VOCAB].argmax(-1) == labels
        rows = [
            loss, ones, -stats["logp"], stats["p"], stats["coeff"], stats["collision"],
            stats["entropy"], hit,
        ]  # fmt: skip
        return grad, torch.stack([row.double()[keep].sum() for row in rows])

    def check(self, steps: int = 2) -> None:
        """Assert that every step minimised and logged what the formulas say, and did step."""
        assert len(self.steps) == steps
        for step in self.steps:
            if step.is_last:
                assert step.reduced == pytest.approx(step.loss, rel=1e-5)
            assert step.logged == pytest.approx(step.metrics, rel=1e-5)
            for name, found in step.found.items():
                expected = step.expected[name]
                assert expected.norm() > 0, name
                tolerance = 1e-5 * float(expected.abs().max())
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=tolerance, msg=name)
        assert not any(torch.equal(*pair) for pair in pairwise(self.weights))
        assert self.validations == 1


def _draw(module: Any) -> None:
    """Weights, whose memory nobody has written to; they expect the last word once more."""
    tensor = parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    seeds = {"words": 100 + tensor, "split": 10 + 2 * stage + tensor, "shared": stage}
    draws = {kind: torch.Generator().manual_seed(seed) for kind, seed in seeds.items()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_split = getattr(parameter, "tensor_model_parallel", False)
            kind, scale = "split" if is_split else "shared", 1.0
            if "word_embeddings" in name or "output_layer" in name:
                kind, scale = "words", 3.0
                draws[kind].manual_seed(seeds[kind])  # the same for both
            noise = torch.randn(parameter.shape, generator=draws[kind])
            wide = parameter.ndim == 2
            parameter.copy_(scale * noise / parameter.shape[1] ** 0.5 if wide else 1 + 0.2 * noise)


def _forward(module: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """A stage's output, logits with the whole vocabulary on the last; and what it came from."""
    entry = None
    mask = batch["attention_mask"]
    if not parallel_state.is_pipeline_first_stage():
        size = (mask.shape[-1], mask.shape[0], module.config.hidden_size)
        entry = _received(torch.empty(size), _previous()).requires_grad_()
        module.set_input_tensor(entry)
    with torch.enable_grad():
        output = module(batch.get("tokens"), batch.get("position_ids"), mask)
        if parallel_state.is_pipeline_last_stage():
            return gather_from_tensor_model_parallel_region(output), entry
    dist.send(output.detach().contiguous(), _next())
    return output, entry


def _next() -> int:
    return int(parallel_state.get_pipeline_model_parallel_next_rank())


def _previous() -> int:
    return int(parallel_state.get_pipeline_model_parallel_prev_rank())


def _received(like: Tensor, source: int) -> Tensor:
    value = torch.empty_like(like.detach(), memory_format=torch.contiguous_format)
    dist.recv(value, source)
    return value


def _logged(trainer: Any) -> dict[str, float]:
    return {name: float(trainer.callback_metrics[name]) for name in METRICS}


def _added(values: Tensor) -> Tensor:
    """The sum over data-parallel ranks."""
    values = values.clone()
    dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    return values
