"""A global batch through the pipeline: megatron-core's forward step, and what means divide by."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_deft.data.batches import Batch, to_device
from megatron_deft.data.loader import Step
from megatron_deft.loss.attach import Attachment
from megatron_deft.loss.reduction import reduce_loss
from megatron_deft.models.heads import rolled
from megatron_deft.models.packed import PackedParams, packed_seq_params
from megatron_deft.platform import device
from megatron_deft.training.statistics import head_sums, token_sums


class StepDenominator:
    """What the step's gradient is divided by: the denominators of its micro-batches, summed.

    megatron-core counts tokens in an integer; weighed tokens and means of samples that
    context-parallel ranks share are no integers. So this counts, and takes the place of its count.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        self.total = torch.zeros((), dtype=torch.float64, device=device())

    def finalize(self, chunks: Sequence[Any], num_tokens: Tensor | None, **options: Any) -> None:
        """megatron-core's finalize_model_grads, which reduces and divides the gradients."""
        assert num_tokens is not None, "calculate_per_token_loss is not set"
        finalize_model_grads(list(chunks), self.total, **options)


def forward_step(
    attachment: Attachment,
    reduction: str,
    denominator: StepDenominator,
    validating: bool = False,
    landscape_vocab: int | None = None,
) -> Callable[..., Any]:
    """megatron-core's forward step: one micro-batch through this stage, and its loss function.

    validating: a micro-batch of nothing but filler, which completes the last global batch, does not
    count as one of the micro-batches that reduction="micro_batch" averages.
    landscape_vocab: the vocabulary's size, to sum the landscape too (see token_sums).
    """

    def loss_function(
        batch: Batch, packed: PackedParams | None, loss: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        statistics = attachment.statistics
        assert statistics is not None
        context = parallel_state.get_context_parallel_group()
        numerator, mine = reduce_loss(
            loss,
            statistics.keep,
            reduction,
            weights=batch["weights"],
            documents=batch["documents"],
            group=context if context.size() > 1 else None,
        )
        if validating and reduction == "micro_batch":
            has_labels = statistics.valid.any().double()
            # a rank's part of a sample may have none where another's has
            dist.all_reduce(has_labels, op=dist.ReduceOp.MAX, group=context)
            mine = has_labels / context.size()
        denominator.total += mine
        sums = token_sums(statistics, numerator, mine, batch["weights"], landscape_vocab)
        if heads := attachment.heads:
            weights = rolled(batch["weights"], len(heads), packed)
            sums = torch.cat([sums, head_sums(heads, weights)])
        return numerator, torch.ones((), dtype=torch.int, device=loss.device), {"sums": sums}

    def run(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        on_host = next(batches)
        attachment.kept_tokens = int((on_host["labels"] >= 0).sum())
        batch = to_device(on_host, device())
        packed = packed_seq_params(batch)
        output = model(
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"],
            loss_mask=batch["weights"],  # of the heads of multi-token prediction alone
            packed_seq_params=packed,
        )  # fmt: skip
        return output, partial(loss_function, batch, packed)

    return run


def pipeline_pass(
    step: Callable[..., Any],
    chunks: Sequence[Any],
    work: Step,
    micro_batch: int,
    forward_only: bool,
) -> list[dict[str, Any]]:
    """Run one global batch through the pipeline; its micro-batches' sums (see statistics).

    step: see forward_step; chunks: this rank's, wrapped; micro_batch: samples of each
    """
    rows = work.batches[0]["tokens"].shape[0]  # packed ones stand behind one another
    parts: list[dict[str, Any]] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(work.batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(work.batches),
        seq_length=work.length * (micro_batch // rows),
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    return parts


def path_of_loss(attachment: Attachment, chunks: Sequence[Any]) -> str:
    """What the loss is made from, in the words of the last pipeline stage, which makes it.

    chunks: this rank's, unwrapped; every rank calls it
    """
    paths: list[str] = [""] * dist.get_world_size()
    is_last = any(chunk.post_process for chunk in chunks)
    dist.all_gather_object(paths, attachment.path if is_last else "")
    return next(path for path in paths if path)
