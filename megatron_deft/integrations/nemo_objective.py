"""An objective as a callback of NeMo's trainer; importing this imports NeMo.

NeMo trains a model with the loss per token that the model itself returns, times a mask from the
data (MaskedTokenLossReduction). The callback puts the objective where that loss is made (`attach`),
marks what is not trained in the labels too, lest it count in an objective's statistics, and takes
tokens that the objective drops out of the mask, so that they leave the mean.

Rejected: subclasses of NeMo's models or configs, whose names would stand in every checkpoint, and
model_transform, the one slot that adapters need.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning import MegatronStrategy
from nemo.utils.callbacks import dist_ckpt_io
from torch import Tensor

from megatron_deft.errors import UserError
from megatron_deft.integrations.nemo_optimizer import mend_optimizer
from megatron_deft.loss.attach import Attachment, attach
from megatron_deft.loss.metrics import METRICS, metric_sums, sum_over_ranks
from megatron_deft.objectives import parse

IGNORED = -100
REDUCTIONS = ("token", "micro_batch")


def check_reduction(reduction: str) -> None:
    """Errors: UserError for what NeMo cannot do."""
    if reduction not in REDUCTIONS:
        raise UserError(
            f"reduction={reduction}: legal under NeMo are {', '.join(REDUCTIONS)}; it counts "
            "tokens, not samples: for means of samples use megatron-deft train"
        )


class ObjectiveCallback(pl.Callback):
    """Trains and validates the model with `objective`; a run.Config of it serialises.

    objective:  a spec such as "deft" (see `objectives.OBJECTIVES`)
    reduction:  "token": the mean over the kept tokens of the global batch, all data- and
                context-parallel ranks and micro-batches together; "micro_batch": over those of
                each micro-batch and rank, then over these, as NeMo does by default. What NeMo
                logs as reduced_train_loss is the token mean of the last step either way
    vocab_size: real vocabulary entries. None: the model config's vocab_size, or else the
                tokenizer's
    attachment: what is attached to the model while it trains or validates

    Of every training step it logs the means over its kept tokens, on all ranks, of METRICS: ce, p,
    gate, collision, entropy and accuracy.
    The model's config has to agree, before the model is built: calculate_per_token_loss is true for
    "token" and false for "micro_batch", and with "token" the strategy's DDP config must not say
    average_in_collective. `deft_finetune_recipe` sees to both.
    Errors: UserError where they do not, and for all that cannot be honoured.
    """

    def __init__(
        self, objective: str = "deft", reduction: str = "token", vocab_size: int | None = None
    ) -> None:
        check_reduction(reduction)
        self.objective = parse(objective)
        self.reduction = reduction
        self.vocab_size = vocab_size
        self.attachment: Attachment | None = None
        self._sums: Tensor | None = None  # of the step's micro-batches

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a trainer or model that would reduce otherwise; before the model is built."""
        _check_strategy(trainer.strategy)
        _check_reduction(self.reduction, pl_module, trainer.strategy)
        mend_optimizer()
        _leave_no_trace(trainer)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """NeMo's strategy has built the model by now."""
        self._attach(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As above."""
        self._attach(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As above, where only validation is asked for."""
        self._attach(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the model its own loss back."""
        if self.attachment is not None:
            self.attachment.detach()
            self.attachment = None

    def on_megatron_microbatch_start(self, batch: dict[str, Tensor | None]) -> None:
        """Ignore masked labels; batch: labels, loss_mask [micro_batch, tokens] where there are."""
        if self.attachment is None:
            return
        self.attachment.statistics = None
        labels, mask = batch.get("labels"), batch.get("loss_mask")
        if labels is not None and mask is not None:
            batch["labels"] = labels.masked_fill(mask == 0, IGNORED)

    def on_megatron_microbatch_end(
        self, step: Any, batch: dict[str, Tensor | None], output: Any
    ) -> None:
        """Take what the objective drops out of the mask; output: the loss, or hidden states."""
        mask = batch.get("loss_mask")
        if self.attachment is None or mask is None:
            return
        statistics = self.attachment.statistics
        if statistics is not None:
            batch["loss_mask"] = kept = mask * statistics.keep
            if not step.forward_only:
                sums = metric_sums(statistics, kept)
                self._sums = sums if self._sums is None else self._sums + sums
        elif not isinstance(output, Tensor) or output.shape == mask.shape:
            raise UserError(
                "the model made its loss elsewhere than where the objective is attached: switch "
                "off a cross-entropy that is fused with the output layer "
                "(model.config.cross_entropy_fusion_impl)"
            )

    def on_megatron_step_end(self, step: Any) -> None:
        """Log the metrics of a training step."""
        if self.attachment is None or step.forward_only:
            return
        sums, self._sums = self._sums, None
        if sums is None:  # no last pipeline stage
            device = next(step.pl_module.parameters()).device
            sums = torch.zeros(1 + len(METRICS), dtype=torch.float64, device=device)
        count, *totals = sum_over_ranks(sums)
        for name, total in zip(METRICS, totals, strict=True):
            # nan without a kept token: 0 would look like a perfect model
            step.pl_module.log(name, (total / count).float(), batch_size=1)

    def _attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.attachment is not None:
            return
        chunks = [
            m for m in trainer.strategy.megatron_parallel if isinstance(m, pl.LightningModule)
        ]
        vocab_size = self.vocab_size or _vocab_size(pl_module)
        self.attachment = attach(chunks, self.objective, vocab_size=vocab_size)


def _check_strategy(strategy: Any) -> None:
    if not isinstance(strategy, MegatronStrategy):
        raise UserError(
            f"the trainer's strategy is {type(strategy).__name__}: an objective needs "
            "nemo.lightning.MegatronStrategy"
        )
    if strategy.async_save and not dist_ckpt_io.HAVE_MEGATRON_CORE:
        # NeMo would say after the first step that it does not find megatron-core; and again while
        # Lightning tears the run down, in place of what is said here
        strategy.async_save = False
        raise UserError(
            "ckpt_async_save=True: NeMo's asynchronous saving imports what megatron-core 0.16 no "
            "longer has: set trainer.strategy.ckpt_async_save=False"
        )


def _check_reduction(reduction: str, module: pl.LightningModule, strategy: Any) -> None:
    config: Any = getattr(module, "config", None)
    per_token = getattr(config, "calculate_per_token_loss", None)
    wanted = reduction == "token"
    if per_token is not wanted:
        raise UserError(
            f"reduction={reduction} needs model.config.calculate_per_token_loss={wanted}, got "
            f"{per_token}: set it, or make the recipe with deft_finetune_recipe"
        )
    ddp = getattr(strategy, "ddp_config", None)
    if wanted and getattr(ddp, "average_in_collective", False):
        raise UserError(
            "reduction=token divides by the tokens of all ranks after their gradients are added: "
            "set trainer.strategy.ddp.average_in_collective=False"
        )
    if not wanted and strategy.context_parallel_size > 1:
        raise UserError(
            f"reduction=micro_batch with context_parallel_size={strategy.context_parallel_size}: "
            "a rank knows its own part of a micro-batch alone; use reduction=token"
        )


def _leave_no_trace(trainer: pl.Trainer) -> None:
    """Take the objective out of the trainer's arguments, which every checkpoint keeps.

    There it would be pickled, and NeMo refuses to unpickle any package's classes but its own.
    """
    arguments: Any = getattr(trainer, "__io__", None)
    callbacks = getattr(arguments, "callbacks", None)
    if isinstance(callbacks, list):
        arguments.callbacks = [c for c in callbacks if not isinstance(c, ObjectiveCallback)]


def _vocab_size(module: Any) -> int:
    found = getattr(module.config, "vocab_size", None)
    found = found or getattr(getattr(module, "tokenizer", None), "vocab_size", None)
    if not found:
        raise UserError("the model has neither vocab_size nor a tokenizer: pass vocab_size=")
    return int(found)
