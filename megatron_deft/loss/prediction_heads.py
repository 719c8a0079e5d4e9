"""Labels of multi-token prediction, which megatron-core rolls by one place for each head.

It fills what it rolls in with 0, a word like any other. So while the forward of a model with such
heads runs, labels are one higher, and 0 is no label.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

SHIFT = "_labels_of_heads"  # the attribute under which a model has its HeadLabels


def has_heads(module: Any) -> bool:
    """Whether the LanguageModule has heads of multi-token prediction."""
    return bool(getattr(module.config, "mtp_num_layers", None))


class HeadLabels:
    """Raises the labels of a model's forward; `lower` takes it back where the loss is made.

    losses: of this forward so far, loss and kept tokens, [b, s] each; the main head's come last
    """

    def __init__(self, module: nn.Module, ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.losses: list[tuple[Tensor, Tensor]] = []
        self._is_raised = False
        self._signature = inspect.signature(type(module).forward)
        self._handles = [
            module.register_forward_pre_hook(self._raise, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def close(self) -> None:
        """Leave the model's labels alone."""
        for handle in self._handles:
            handle.remove()

    def lower(self, labels: Tensor) -> Tensor:
        """The labels as they were given, and ignored where there is none."""
        if not self._is_raised:
            return labels
        return (labels - (labels > 0).to(labels.dtype)).where(labels != 0, self.ignore_index)

    def _raise(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = self._signature.bind_partial(module, *args, **kwargs)
        labels = given.arguments.get("labels")
        self.losses = []
        self._is_raised = labels is not None
        if labels is None:
            return None
        raised = (labels + (labels >= 0).to(labels.dtype)).where(labels != self.ignore_index, 0)
        given.arguments["labels"] = raised
        return given.args[1:], given.kwargs

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._is_raised = False
