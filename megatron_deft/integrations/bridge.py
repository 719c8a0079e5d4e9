"""An objective for Megatron-Bridge's training loop.

    from megatron.bridge.training.finetune import finetune  # or pretrain, of training.pretrain
    from megatron_deft.integrations.bridge import deft_forward_step

    config = ...  # a recipe's ConfigContainer
    finetune(config, forward_step_func=deft_forward_step(config, "deft"))

Two things make the objective train as it should, and this does both. The model's loss is replaced
while Bridge builds it (`attach`, registered as a hook of the model provider). And Bridge's own
forward step is wrapped: its data mark what is not trained by a loss mask alone, so the labels are
ignored there too, lest they count in an objective's statistics; and the mean divides by the tokens
that the objective keeps. Getting a batch, packing, context parallelism and the checks of the loss
stay Bridge's.

Written against Megatron-Bridge 0.3 and 0.4. It is imported when the first step runs, never before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron_deft.errors import UserError
from megatron_deft.loss.attach import Attachment, attach
from megatron_deft.loss.metrics import METRICS, metric_sums
from megatron_deft.loss.statistics import TokenStatistics
from megatron_deft.objectives import Objective, parse

if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer
    from megatron.bridge.training.state import GlobalState

IGNORED = -100
REDUCTIONS = ("token", "micro_batch")
log = logging.getLogger(__name__)

Step = Callable[..., tuple[Any, Callable[..., Any]]]


def deft_forward_step(
    config: ConfigContainer,
    objective: str | Objective = "deft",
    *,
    reduction: str = "token",
    vocab_size: int | None = None,
    forward_step: Step | None = None,
) -> ObjectiveForwardStep:
    """The `forward_step_func` that trains `config`'s model with `objective`; registers the hook.

    config:       the ConfigContainer that goes to finetune() or pretrain() with the result.
                  Two of its values are set: model.calculate_per_token_loss, to what the reduction
                  needs, and with "token" ddp.average_in_collective to False
    objective:    a spec such as "deft" (see `objectives.OBJECTIVES`)
    reduction:    "token": the mean over the kept tokens of the global batch; "micro_batch": over
                  those of each micro-batch and rank, then over these
    vocab_size:   real vocabulary entries. None: the model provider's, as it is when Bridge builds
                  the model
    forward_step: the step that is wrapped. None: megatron.bridge.training.gpt_step.forward_step

    What Bridge logs as "lm loss" is then the objective; beside it stand ce (cross-entropy), p,
    gate, collision, entropy and accuracy, means over the tokens of the loss. A loss mask of other
    values than 0 and 1 weighs tokens, and their count is rounded down, as Bridge does.
    Errors: UserError for what cannot be honoured, here or in the first step.
    """
    parsed = parse(objective)
    if reduction not in REDUCTIONS:
        raise UserError(
            f"reduction={reduction}: legal are {', '.join(REDUCTIONS)}; megatron-core counts "
            "tokens, not samples: for means of samples use megatron-deft train"
        )
    provider = config.model
    if reduction == "micro_batch" and provider.context_parallel_size > 1:
        raise UserError(
            f"reduction=micro_batch with context_parallel_size={provider.context_parallel_size}: a "
            "rank knows its own part of a micro-batch alone; use reduction='token'"
        )
    if parsed.batch_mean and getattr(config.dist, "use_decentralized_pg", False):
        raise UserError(
            f"objective {parsed.spec} takes a mean of p over ranks, which are not known with "
            "dist.use_decentralized_pg=True: set it to False, or use cayley(floor=0)"
        )
    step = ObjectiveForwardStep(parsed, provider, vocab_size, forward_step)
    _set_reduction(config, per_token=reduction == "token")
    _register(provider, step.attach)
    return step


def _set_reduction(config: ConfigContainer, per_token: bool) -> None:
    # newer configurations of a model keep megatron-core's apart
    transformer = getattr(config.model, "transformer", config.model)
    wanted: list[tuple[Any, str, bool]] = [(transformer, "calculate_per_token_loss", per_token)]
    if per_token:  # megatron-core refuses the two together
        wanted.append((config.ddp, "average_in_collective", False))
    for section, name, value in wanted:
        if getattr(section, name) != value:
            setattr(section, name, value)
            log.info("%s is set to %s, for the mean over tokens that was asked for", name, value)


def _register(provider: Any, hook: Callable[[list[nn.Module]], list[nn.Module]]) -> None:
    """As a hook of a model provider, or of the model configurations of newer releases."""
    if hasattr(provider, "register_pre_wrap_hook"):
        provider.register_pre_wrap_hook(hook)
    elif hasattr(provider, "pre_wrap_hooks"):
        provider.pre_wrap_hooks.append(hook)
    else:
        raise UserError(
            f"config.model is a {type(provider).__name__}: expected a model provider of "
            "Megatron-Bridge, which has register_pre_wrap_hook"
        )


class ObjectiveForwardStep:
    """Bridge's forward step with an objective, which `deft_forward_step` makes.

    attachment: what is attached to the model, once Bridge has built it
    """

    def __init__(
        self,
        objective: Objective,
        provider: Any,
        vocab_size: int | None,
        forward_step: Step | None,
    ) -> None:
        self.attachment: Attachment | None = None
        self._objective = objective
        self._provider = provider
        self._vocab_size = vocab_size
        self._forward_step = forward_step

    def attach(self, chunks: list[nn.Module]) -> list[nn.Module]:
        """The hook: attach the objective to the model's chunks before they are wrapped."""
        # not earlier: Bridge takes it from the tokenizer just before
        vocab_size = self._vocab_size or self._provider.vocab_size
        self.attachment = attach(chunks, self._objective, vocab_size=vocab_size)
        return chunks

    def __call__(
        self,
        state: GlobalState,
        data_iterator: Iterator[Mapping[str, Any]] | None,
        model: nn.Module,
        return_schedule_plan: bool = False,
    ) -> tuple[Any, Callable[..., Any]]:
        """One micro-batch through a pipeline stage: its output, and the function of its loss."""
        if self.attachment is None:
            raise UserError(
                "the objective is not attached to the model: give deft_forward_step the very "
                "config that goes to finetune() or pretrain()"
            )
        if return_schedule_plan:
            raise UserError(
                "overlap_moe_expert_parallel_comm=True computes micro-batches interwoven, and an "
                "objective's statistics could be another's: set it to False"
            )
        if self._forward_step is None:
            from megatron.bridge.training.gpt_step import forward_step

            self._forward_step = forward_step
        self.attachment.statistics = None
        batches = None if data_iterator is None else _IgnoringMasked(data_iterator)
        output, loss_function = self._forward_step(state, batches, model)
        return output, partial(objective_loss, loss_function, self.attachment.statistics)


class _IgnoringMasked:
    """An iterator of batches with `ignore_masked`; map() would ask Bridge's to be iterable."""

    def __init__(self, batches: Iterator[Mapping[str, Any]]) -> None:
        self._batches = batches

    def __iter__(self) -> _IgnoringMasked:
        return self

    def __next__(self) -> Mapping[str, Any]:
        return ignore_masked(next(self._batches))


def ignore_masked(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch with labels of -100 where its loss_mask is 0; the same where it has none of both.

    labels, loss_mask: [batch, tokens]
    """
    labels, mask = batch.get("labels"), batch.get("loss_mask")
    if labels is None or mask is None:  # not the last pipeline stage
        return batch
    return {**batch, "labels": labels.masked_fill(mask == 0, IGNORED)}


def objective_loss(
    loss_function: Callable[..., Any], statistics: TokenStatistics | None, output: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Bridge's loss function over the tokens that the objective keeps.

    loss_function: partial(masked_next_token_loss, loss_mask, ...), loss_mask [batch, tokens]
    statistics:    of the model's loss for this micro-batch, [batch, tokens]
    output:        that loss, [batch, tokens] fp32
    returns: numerator, denominator (int) and what is logged, each a sum and what it is divided by
    """
    if statistics is None:
        raise UserError(
            "the model did not compute its loss where the objective is attached: switch off a "
            "cross-entropy that is fused with the output layer (cross_entropy_fusion_impl='linear')"
        )
    mask, *args = getattr(loss_function, "args", ()) or (None,)
    if not (isinstance(mask, Tensor) and mask.numel() == statistics.keep.numel()):
        raise UserError(
            f"the wrapped forward step returned the loss function {loss_function!r}: expected "
            "partial(masked_next_token_loss, loss_mask, ...), as Megatron-Bridge's GPT steps do"
        )
    assert isinstance(loss_function, partial)
    weights = mask.view_as(statistics.keep) * statistics.keep
    rest = partial(loss_function.func, weights, *args, **loss_function.keywords)
    numerator, denominator, report = rest(output)
    count, *sums = metric_sums(statistics, weights).float()
    metrics = {name: torch.stack([value, count]) for name, value in zip(METRICS, sums, strict=True)}
    return numerator, denominator, {**report, **metrics}
