"""An objective for every trainer that takes Hugging Face's `compute_loss_func`.

Hugging Face Trainer, and TRL's SFTTrainer with SFTConfig(loss_type="nll"): its "chunked_nll", the
default, keeps the logits, and "dft" is a loss of its own:

    from megatron_deft.integrations.transformers import ObjectiveCallback, compute_loss_func

    loss = compute_loss_func("deft")
    trainer = Trainer(..., compute_loss_func=loss, callbacks=[ObjectiveCallback(loss)])

LLaMA-Factory (its use_dft_loss, use_eaft_loss and use_asft_loss off: they would take its place).
A file sft.py, started as `torchrun --nproc-per-node 8 sft.py CONFIG.yaml`:

    from functools import partial
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp
    from megatron_deft.integrations.transformers import ObjectiveCallback, compute_loss_func

    loss = compute_loss_func("deft")
    workflow.CustomSeq2SeqTrainer = partial(workflow.CustomSeq2SeqTrainer, compute_loss_func=loss)
    run_exp(callbacks=[ObjectiveCallback(loss)])

ms-swift 4 (not its Megatron trainers). A file deft.py, named on the command line by
`swift sft ... --external_plugins deft.py --loss_type deft`:

    from swift.loss import loss_map
    from megatron_deft.integrations.transformers import compute_loss_func

    loss_map["deft"] = lambda args, trainer: compute_loss_func("deft")

ms-swift 3 has functions there: `from swift.plugin.loss import loss_mapping` and
`loss_mapping["deft"] = compute_loss_func("deft")`.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from megatron_deft.errors import UserError
from megatron_deft.loss.metrics import METRICS, metric_sums
from megatron_deft.loss.reduction import reduce_loss
from megatron_deft.loss.statistics import TokenStatistics
from megatron_deft.loss.vocab_parallel import token_loss
from megatron_deft.objectives import Objective, parse

REDUCTIONS = ("token", "label")


def compute_loss_func(
    objective: str | Objective,
    *,
    reduction: str = "token",
    ignore_index: int = -100,
    inplace_backward: bool = True,
    batch_group: dist.ProcessGroup | None = None,
) -> "ObjectiveLoss":
    """What a Hugging Face trainer's `compute_loss_func` is to be, for the loss to be `objective`.

    objective:        a spec such as "deft" (see `objectives.OBJECTIVES`)
    reduction:        "token": the sum over the tokens that the objective keeps / their number;
                      "label": the same sum / the number of all labels. They differ only for
                      objectives that drop tokens (OnlyTopP, ...)
    ignore_index:     label of tokens that are not trained; the trainer counts those that are not
                      -100, so another one only goes with a trainer that counts otherwise
    inplace_backward: write the gradient over the logits: no memory beyond them, and
                      `outputs.logits` is gone after the backward
    batch_group:      ranks whose tokens share the batch mean of `cayley(floor=data_parallel)`

    The mean is over the whole global batch: `num_items_in_batch`, which the trainer counts over
    gradient accumulation and (average_tokens_across_devices, its default) devices. So k
    accumulation steps train as one batch of k times the size does. Without it, as some trainers
    evaluate, the mean is over the tokens of the call. Nothing but ignored labels gives 0.

    What that count cannot tell:
    - how many tokens an objective drops. reduction="token" is then exact where one call sees all
      labels of the step (one device, no accumulation), and an error where it does not.
    - how many micro-batches or samples there are: reduction="micro_batch" and "sample" are those
      of `megatron-deft train`, here they are errors. `cayley` takes its mean of p over the labels
      of one call, by its definition: with it accumulation is not the same as a larger batch.
    - transformers 4 counts a label at position 0, which nothing predicts, where it is not ignored.

    Errors: UserError naming what was expected and the mend, among others where the model returns
    no logits, or only a part of each sequence (context or sequence parallelism), or is an
    encoder-decoder.
    """
    if reduction not in REDUCTIONS:
        raise UserError(
            f"reduction={reduction}: legal are {', '.join(REDUCTIONS)}; a trainer tells its loss "
            "function the number of labels of a step, not of micro-batches or samples: for those "
            "means use megatron-deft train"
        )
    return ObjectiveLoss(parse(objective), reduction, ignore_index, inplace_backward, batch_group)


class ObjectiveLoss:
    """The loss function that `compute_loss_func` makes.

    objective:  the parsed objective
    statistics: TokenStatistics of the last call, [batch, tokens] each, or None
    """

    def __init__(
        self,
        objective: Objective,
        reduction: str,
        ignore_index: int,
        inplace_backward: bool,
        batch_group: dist.ProcessGroup | None,
    ) -> None:
        self.objective = objective
        self.statistics: TokenStatistics | None = None
        self._reduction = reduction
        self._ignore_index = ignore_index
        self._inplace_backward = inplace_backward
        self._batch_group = batch_group
        self._watchers: list[ObjectiveCallback] = []

    def __call__(
        self,
        outputs: Any,
        labels: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        loss_scale: Tensor | None = None,
        trainer: Any = None,
    ) -> Tensor:
        """The loss of one micro-batch: a scalar, fp32.

        outputs:            the model's, with logits [batch, tokens, vocabulary] fp32, bf16 or fp16
        labels:             [batch, tokens] int64, not shifted: labels[:, t] is token t
        num_items_in_batch: labels of the whole step; one equal count per replica of DataParallel
        loss_scale, trainer: what ms-swift hands over; weights of tokens are refused
        """
        _refuse_parts(loss_scale, trainer)
        _refuse_smoothing(getattr(trainer, "args", None))
        _refuse_encoder(outputs, getattr(trainer, "model", None))
        if labels is None:
            raise UserError(
                "the trainer handed over no labels: the data collator must make a column labels "
                "(for a PEFT model set label_names=['labels'])"
            )
        if trainer is None and _field(outputs, "aux_loss") is not None:  # ms-swift adds it itself
            raise UserError(
                "the model returns the balancing loss of its routers, and nobody tells a loss "
                "function how much it counts: set output_router_logits=False"
            )
        following = nn.functional.pad(labels, (0, 1), value=self._ignore_index)[..., 1:]
        logits = _logits(outputs, following.shape)
        training = torch.is_grad_enabled() and logits.requires_grad
        loss, statistics = token_loss(
            logits,
            following.to(logits.device),
            self.objective,
            ignore_index=self._ignore_index,
            inplace_backward=self._inplace_backward and training,
            batch_group=self._batch_group,
            return_stats=True,
        )
        self.statistics = statistics
        for watcher in self._watchers:
            watcher.saw(statistics, torch.is_grad_enabled())
        counted = statistics.keep if self._reduction == "token" else statistics.valid
        numerator, denominator = reduce_loss(loss, counted, "token")
        if num_items_in_batch is not None:
            denominator = self._of_the_step(num_items_in_batch, denominator, statistics)
        return numerator / denominator.where(denominator > 0, 1)

    def _of_the_step(
        self, items: Tensor | int, mine: Tensor, statistics: TokenStatistics
    ) -> Tensor:
        """What the numerators of the whole step, of which this call has one, are divided by."""
        counts = torch.as_tensor(items, device=mine.device).flatten()
        # DataParallel: the count stands there once for each replica, while the outputs are those
        # of all of them, and the trainer will multiply the loss by the number of replicas.
        replicas = counts.numel()
        if self._reduction == "label" or not _drops_tokens(self.objective):
            return counts[0] * replicas
        labels, total = int(statistics.valid.sum()), int(counts[0])
        if labels not in (0, total):
            raise UserError(
                f"{self.objective.spec} drops tokens, and this call sees {labels} of the step's "
                f"{total} labels, so the number of all kept tokens is not known: train with "
                "gradient_accumulation_steps=1 on one device (transformers 4: and with position 0 "
                "ignored), or use reduction='label', which divides by all labels"
            )
        return mine * replicas


def _drops_tokens(objective: Objective) -> bool:
    gate = objective.gate(vocab_size=2)
    return gate is not None and (gate.low > -math.inf or gate.high < math.inf)


def _field(outputs: Any, name: str) -> Any:
    """One of a model's outputs, a mapping or an object; None where there is none of the name."""
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _logits(outputs: Any, shape: torch.Size) -> Tensor:
    """The logits among a model's outputs: a mapping, an object, or a tuple that may begin with a
    loss. `shape` is that of the labels."""
    is_tuple = isinstance(outputs, tuple | list)
    found = list(outputs[:2]) if is_tuple else [_field(outputs, "logits")]
    tensors = [value for value in found if isinstance(value, Tensor) and value.dim() > 0]
    if not tensors:
        raise UserError(
            "the model returned no logits: a fused linear loss keeps them; switch it off "
            "(use_liger_kernel=False or liger_kernel_config={'fused_linear_cross_entropy': False}; "
            "TRL: loss_type='nll'; Unsloth: UNSLOTH_RETURN_LOGITS=1)"
        )
    if tensors[0].shape[:-1] != shape:
        raise UserError(
            f"the model returned logits {list(tensors[0].shape)} for labels {list(shape)}: "
            "expected one row of logits for each label; virtual tokens of prompt tuning, and "
            "logits_to_keep, are not supported"
        )
    return tensors[0]


def _refuse_parts(loss_scale: Tensor | None, trainer: Any) -> None:
    """Errors: UserError where labels are weighed, or are a part of their sequence."""
    if loss_scale is not None:
        raise UserError(
            "loss_scale weighs single tokens, which an objective has no place for: leave "
            "--loss_scale at a setting of zeros and ones, such as its default"
        )
    swift = getattr(getattr(trainer, "template", None), "sequence_parallel_size", 1)
    accelerate = sys.modules.get("accelerate.state")
    state = accelerate.AcceleratorState._shared_state if accelerate else {}
    layout = state.get("parallelism_config")
    sizes = {
        "sequence_parallel_size": swift,
        "cp_size": getattr(layout, "cp_size", 1),
        "sp_size": getattr(layout, "sp_size", 1),
    }
    for name, size in sizes.items():
        if size is not None and size > 1:
            raise UserError(
                f"{name}={size}: each device holds a part of every sequence, whose last label is "
                "on another one; set it to 1, or use megatron-deft train with parallel.context"
            )


def _refuse_smoothing(args: Any) -> None:
    """Errors: UserError where the trainer's arguments ask for what it then leaves out."""
    factor = getattr(args, "label_smoothing_factor", None)
    if factor:
        raise UserError(
            f"label_smoothing_factor={factor} has no effect on a loss function of one's own: set "
            "it to 0"
        )


def _refuse_encoder(outputs: Any, model: Any) -> None:
    """Errors: UserError for a decoder that predicts labels[:, t] at t, not labels[:, t + 1]."""
    told = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if told or _field(outputs, "encoder_last_hidden_state") is not None:
        raise UserError(
            "the model is an encoder-decoder, whose labels are not shifted: this loss, which "
            "shifts them by one, would train it on the wrong tokens; use a causal language model"
        )


class ObjectiveCallback(TrainerCallback):
    """Logs what the objective sees, and stops a run that trains with another loss.

    loss: what `compute_loss_func` made

    Next to `loss` stand ce (cross-entropy), p, gate, collision, entropy and accuracy: means over
    all tokens that the objective kept since the last line, on all devices; next to eval_loss the
    same with its prefix. They are in the printed line, in trainer_state.json, and in the reporters
    that follow this callback: report_to="none" and
    callbacks=[ObjectiveCallback(loss), TensorBoardCallback()]. A metric of the same name that is
    there already, as TRL's entropy, stays.

    eval_loss is the trainer's, a mean of the means of the batches, each counted by its samples;
    eval_ce and the others are means over tokens. So with "nll" eval_loss and eval_ce differ where
    batches differ in their tokens.

    Errors: UserError before the first update where the trainer did not call the loss function
    (another loss has taken its place), would smooth labels, or has an encoder-decoder.
    """

    def __init__(self, loss: ObjectiveLoss) -> None:
        self._calls = 0
        self._sums: dict[bool, Tensor] = {}
        loss._watchers.append(self)

    def saw(self, statistics: TokenStatistics, training: bool) -> None:
        """Add a call of the loss function to the sums."""
        self._calls += training
        sums = metric_sums(statistics)
        self._sums[training] = self._sums[training] + sums if training in self._sums else sums

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what the trainer would leave out without a word."""
        self._calls = 0
        self._sums.clear()
        if getattr(args, "loss_type", None) == "chunked_nll":  # TRL's, and its default
            raise UserError(
                "loss_type='chunked_nll' of TRL computes a loss of its own in the place of logits: "
                "set SFTConfig(loss_type='nll')"
            )
        _refuse_smoothing(args)
        _refuse_encoder(None, kwargs.get("model"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to train with a loss that is not the objective's."""
        if not self._calls:
            raise UserError(
                "the trainer did not call the loss function of compute_loss_func: another loss has "
                "taken its place (sequence parallelism of DeepSpeed, LLaMA-Factory's use_dft_loss, "
                "use_eaft_loss or use_asft_loss, a compute_loss of its own): switch that off"
            )
        self._calls = 0

    def on_predict(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Forget what was predicted: nothing is logged of it."""
        self._sums.pop(False, None)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the means to the line that is logged."""
        prefixes = [name[: -len("loss")] for name in logs or () if name.endswith("loss")]
        if not prefixes or prefixes[0] == "train_":  # the summary of a run
            return
        means = _means(self._sums.pop(prefixes[0] == "", None), args.device)
        for entry in (logs, state.log_history[-1]):
            for name, value in means.items():
                entry.setdefault(prefixes[0] + name, value)


def _means(sums: Tensor | None, device: torch.device) -> dict[str, float]:
    """The metrics from the sums of all devices; nothing where no token was kept."""
    if sums is None:
        sums = torch.zeros(1 + len(METRICS), dtype=torch.float64, device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)  # every rank logs, and saw other tokens
    count, *totals = sums.tolist()
    return dict(zip(METRICS, (total / count for total in totals), strict=True)) if count else {}
