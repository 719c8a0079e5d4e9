"""The one hook into megatron-core: LanguageModule.compute_language_model_loss.

Every megatron-core language model (GPT, its multi-token-prediction heads, Mamba) makes its loss
there, from labels [b, s] and this rank's logits [s, b, V_local]. Replacing that one bound method on
the instance changes the objective and nothing else: no subclass, no global patch.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from megatron_deft.errors import UserError
from megatron_deft.loss.inputs import obstacle_to_single_read
from megatron_deft.loss.statistics import TokenStatistics
from megatron_deft.loss.vocab_parallel import token_loss
from megatron_deft.objectives import Objective, parse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


HOOKED = "compute_language_model_loss"


class Attachment:
    """What `attach` put on a model.

    objective:  the parsed objective
    statistics: TokenStatistics of the last loss computed, [b, s] each, or None. With multi-token
                prediction the main head comes last, so these are the main head's.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.statistics: TokenStatistics | None = None
        self._hooks: list[tuple[nn.Module, MethodType]] = []

    def detach(self) -> None:
        """Give the models their own loss back, where no later `attach` has replaced this one."""
        for module, hook in self._hooks:
            if vars(module).get(HOOKED) is hook:
                delattr(module, HOOKED)
        self._hooks.clear()


def attach(
    model: nn.Module | Iterable[nn.Module],
    objective: str | Objective,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    inplace_backward: bool = True,
    grad_in_forward: bool | None = None,
) -> Attachment:
    """Make a megatron-core model train with `objective` instead of cross-entropy.

    model:            a LanguageModule (GPTModel, MambaModel, ...), bare or wrapped (Float16Module,
                      DistributedDataParallel), or the list of a virtual pipeline's chunks
    objective:        a spec such as "deft" (see `objectives.OBJECTIVES`)
    vocab_size:       real vocabulary entries, without Megatron's padding
    ignore_index:     label of tokens that are not trained
    inplace_backward: write the gradient over the logits, which nothing else in megatron-core needs
    grad_in_forward:  make the gradient together with the loss, from a single read of the logits
                      (see `token_loss`). None: where that is possible and pays, which is when the
                      model's config says calculate_per_token_loss, so that the upstream gradient
                      is 1

    The model's forward(labels=...) then returns the objective's loss [b, s] fp32, 0 where the label
    is ignored; inference and labels=None are unchanged. Attaching again replaces the objective.
    Multi-token prediction: megatron-core fills the label it rolls in with 0 and masks its loss
    afterwards, so that token of each head counts in the batch mean of `cayley`.
    Errors: UserError when no module of `model` is a LanguageModule, or vocab_size does not fit.
    """
    from megatron.core.models.common.language_module.language_module import LanguageModule

    attachment = Attachment(parse(objective))
    roots = [model] if isinstance(model, nn.Module) else list(model)
    modules: dict[int, nn.Module] = {}
    for root in roots:
        found = [module for module in root.modules() if isinstance(module, LanguageModule)]
        if not found:
            raise UserError(
                "attach: expected a megatron-core LanguageModule (GPTModel, MambaModel, ...), got "
                f"{type(root).__name__}; for other models call megatron_deft.token_loss"
            )
        padded = getattr(found[0], "vocab_size", None)
        if padded is not None and not 0 < vocab_size <= padded:
            raise UserError(
                f"attach: vocab_size={vocab_size} does not fit the model, whose (padded) "
                f"vocabulary has {padded} entries; pass the tokenizer's size"
            )
        modules |= {id(module): module for module in found}
    loss = _hook(attachment, vocab_size, ignore_index, inplace_backward, grad_in_forward)
    for module in modules.values():
        hook = MethodType(loss, module)
        setattr(module, HOOKED, hook)
        attachment._hooks.append((module, hook))
    return attachment


def _hook(
    attachment: Attachment,
    vocab_size: int,
    ignore_index: int,
    inplace_backward: bool,
    grad_in_forward: bool | None,
) -> Any:
    def compute_language_model_loss(self: Any, labels: Tensor, logits: Tensor) -> Tensor:
        """Labels [b, s], logits [s, b, V_local] -> loss [b, s] fp32."""
        group = _tensor_group(self)
        padded = getattr(self, "vocab_size", None)
        if padded is not None and logits.shape[-1] * group.size() != padded:
            raise UserError(
                f"attach: expected logits with {padded // group.size()} columns on each of "
                f"{group.size()} tensor-parallel ranks, got {logits.shape[-1]}; build the model "
                "with parallel_output=True"
            )
        pays = (
            inplace_backward
            and _has_unit_upstream(self)
            and not obstacle_to_single_read(attachment.objective, group.size() == 1, logits.dtype)
        )
        loss, statistics = token_loss(
            logits,
            labels.transpose(0, 1),
            attachment.objective,
            group=group,
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            inplace_backward=inplace_backward,
            grad_in_forward=pays if grad_in_forward is None else grad_in_forward,
            batch_group=_batch_group(attachment.objective),
            return_stats=True,
        )
        attachment.statistics = TokenStatistics(
            **{name: value.transpose(0, 1) for name, value in vars(statistics).items()}
        )
        return loss.transpose(0, 1).contiguous()

    return compute_language_model_loss


def _tensor_group(module: Any) -> ProcessGroup:
    collection = getattr(module, "pg_collection", None)
    if collection is not None and getattr(collection, "tp", None) is not None:
        return collection.tp
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def _has_unit_upstream(module: Any) -> bool:
    """Whether megatron-core sums the losses, and does not scale them as it does MTP heads'."""
    config = module.config
    return bool(config.calculate_per_token_loss) and not getattr(config, "mtp_num_layers", None)


def _batch_group(objective: Objective) -> ProcessGroup | None:
    """The ranks whose tokens make one batch: context-parallel ones, or the data-parallel too."""
    from megatron.core import parallel_state

    if objective.batch_mean is None:
        return None
    if objective.batch_mean == "data_parallel":
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_context_parallel_group()
