"""The one hook into megatron-core: LanguageModule.compute_language_model_loss.

Every megatron-core language model (GPT, its multi-token-prediction heads, Mamba) makes its loss
there, from labels [b, s] and this rank's logits [s, b, V_local]. Replacing that one bound method on
the instance changes the objective and nothing else: no subclass, no global patch.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from megatron_deft.errors import UserError
from megatron_deft.loss.inputs import check_numbers, obstacle_to_single_read
from megatron_deft.loss.output_layer import ROUTE, Route, is_small, obstacle_to_fused_linear
from megatron_deft.loss.prediction_heads import SHIFT, HeadLabels, has_heads
from megatron_deft.loss.statistics import TokenStatistics
from megatron_deft.loss.vocab_parallel import token_loss
from megatron_deft.objectives import Objective, parse

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


HOOKED = "compute_language_model_loss"


class Attachment:
    """What `attach` put on a model.

    objective:  the parsed objective
    statistics:  TokenStatistics of the last loss computed, [b, s] each, or None. With multi-token
                 prediction the main head comes last, so these are the main head's.
    kept_tokens: with fused_linear on CUDA: an upper bound of the next micro-batch's labels that are
                 not ignored, to be set before its forward by whoever has them on the host; the rest
                 then costs nothing. None: every token is computed (the CPU counts by itself)
    path:        what the loss is made from, in words
    heads:       of the last loss computed, of each head of multi-token prediction: its loss and its
                 kept tokens, [b, s] each; its labels lie one place further than the head's before
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.statistics: TokenStatistics | None = None
        self.kept_tokens: int | None = None
        self.path = "logits"
        self.heads: list[tuple[Tensor, Tensor]] = []
        self._hooks: list[tuple[nn.Module, MethodType]] = []

    def detach(self) -> None:
        """Give the models their own loss back, where no later `attach` has replaced this one."""
        for module, hook in self._hooks:
            if vars(module).get(HOOKED) is hook:
                delattr(module, HOOKED)
                _close_hooks(module)
        self._hooks.clear()


def attach(
    model: nn.Module | Iterable[nn.Module],
    objective: str | Objective,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    inplace_backward: bool = True,
    grad_in_forward: bool | None = None,
    fused_linear: bool | Literal["auto"] = False,
    chunk_tokens: int | None = None,
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
    fused_linear:     make the loss from the hidden states and the output layer's weight, tile by
                      tile, and never the logits (see `fused_linear_loss`); the two arguments above
                      then change nothing. "auto": where the model allows it, and the output layer
                      is large enough (2^20 weights on this rank) for it to win
    chunk_tokens:     with fused_linear: how many rows of logits may exist at a time

    The model's forward(labels=...) then returns the objective's loss [b, s] fp32, 0 where the label
    is ignored; inference and labels=None are unchanged. Attaching again replaces the objective.
    Multi-token prediction: the heads' losses are of the same objective; labels that would lie
    beyond the end are ignored.
    Errors: UserError when no module of `model` is a LanguageModule, vocab_size does not fit, or
    fused_linear=True meets an output layer that it does not know.
    """
    check_numbers(softcap=None, chunk_tokens=chunk_tokens, kept_tokens=None)
    if fused_linear not in (True, False, "auto"):
        raise UserError(f"fused_linear={fused_linear!r}: legal are True, False, 'auto'")
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
    is_fused = fused_linear is not False
    if is_fused:
        obstacles = [obstacle_to_fused_linear(module) for module in modules.values()]
        if fused_linear == "auto":
            obstacles += map(is_small, modules.values())
        obstacle = next(filter(None, obstacles), "")
        if obstacle and fused_linear != "auto":
            raise UserError(f"attach(fused_linear=True): {obstacle}; use fused_linear=False")
        is_fused = not obstacle
        attachment.path = (
            f"logits ({obstacle})" if obstacle else "hidden states, without logits (fused_linear)"
        )
    loss = _hook(attachment, vocab_size, ignore_index, inplace_backward, grad_in_forward)
    for module in modules.values():
        _close_hooks(module)
        hook = MethodType(loss, module)
        setattr(module, HOOKED, hook)
        attachment._hooks.append((module, hook))
        if has_heads(module):
            setattr(module, SHIFT, HeadLabels(module, ignore_index))
        has_head = getattr(module, "output_layer", None) is not None
        if is_fused and has_head:
            setattr(module, ROUTE, Route(module, chunk_tokens))
    return attachment


def _close_hooks(module: nn.Module) -> None:
    for name in (ROUTE, SHIFT):
        if (hooks := vars(module).pop(name, None)) is not None:
            hooks.close()


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
        shift: HeadLabels | None = vars(self).get(SHIFT)
        if shift is not None:
            labels = shift.lower(labels)
        common: dict[str, Any] = {
            "group": group,
            "vocab_size": vocab_size,
            "ignore_index": ignore_index,
            "batch_group": _batch_group(attachment.objective),
        }
        route: Route | None = vars(self).get(ROUTE)
        if route is not None and route.is_open:
            loss, statistics = route.loss(
                logits,
                labels.transpose(0, 1),
                attachment.objective,
                **common,
                kept_tokens=None if has_heads(self) else attachment.kept_tokens,
            )
            return remember(loss, statistics, shift)
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
            **common,
            inplace_backward=inplace_backward,
            grad_in_forward=pays if grad_in_forward is None else grad_in_forward,
            return_stats=True,
        )
        return remember(loss, statistics, shift)

    def remember(loss: Tensor, statistics: TokenStatistics, shift: HeadLabels | None) -> Tensor:
        attachment.statistics = TokenStatistics(
            **{name: value.transpose(0, 1) for name, value in vars(statistics).items()}
        )
        loss = loss.transpose(0, 1).contiguous()
        if shift is not None:
            attachment.heads = list(shift.losses)  # this one is the main head's, if no more come
            shift.losses.append((loss.detach(), attachment.statistics.keep))
        return loss

    return compute_language_model_loss


def _tensor_group(module: Any) -> ProcessGroup:
    collection = getattr(module, "pg_collection", None)
    if collection is not None and getattr(collection, "tp", None) is not None:
        return collection.tp
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def _has_unit_upstream(module: Any) -> bool:
    """Whether megatron-core sums the losses, and does not scale them as it does MTP heads'."""
    return bool(module.config.calculate_per_token_loss) and not has_heads(module)


def _batch_group(objective: Objective) -> ProcessGroup | None:
    """The ranks whose tokens make one batch: context-parallel ones, or the data-parallel too."""
    from megatron.core import parallel_state

    if objective.batch_mean is None:
        return None
    if objective.batch_mean == "data_parallel":
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_context_parallel_group()
