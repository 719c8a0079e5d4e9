"""Loss scaling for fp16: the loss times a number that keeps small gradients above fp16's least.

`build_loss_scale` gives other types one that does nothing.

megatron-core's own scaler, moved by the gradients that overflow. A step whose gradients do changes
nothing but the scale; it is no fault of the data, and is counted apart.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_deft.errors import UserError
from megatron_deft.platform import device

PATIENCE = 10  # steps in a row that may overflow at a scale that cannot fall


class _Follower(MegatronGradScaler):
    """Another's scale; whoever has it moves it."""

    def __init__(self, leader: MegatronGradScaler) -> None:
        self._leader = leader

    @property
    def scale(self) -> Tensor:
        return self._leader.scale

    @property
    def inv_scale(self) -> Tensor:
        return self._leader.inv_scale

    def update(self, found_inf: bool) -> None:
        """Nothing: see LossScale."""

    def state_dict(self) -> dict[str, Any]:
        return self._leader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._leader.load_state_dict(state_dict)


class NoLossScale:
    """That of types which need none."""

    overflows = 0
    is_loss_finite = True

    def stop_if_stuck(self, step: int) -> None:
        """Nothing can be."""

    def metrics(self) -> dict[str, float]:
        """Nothing to log."""
        return {}

    def state(self) -> dict[str, float] | None:
        """Nothing to save."""
        return None

    def load(self, state: dict[str, float]) -> None:
        """Nothing to go on from."""


class LossScale(NoLossScale):
    """One scale for all parts of an optimizer, moved once a step, alike on every rank.

    megatron-core gives each part (experts that are spread over ranks are one) a scaler of its own
    but scales the loss by the first one's; an overflow in one part, or on one rank's experts, would
    set them apart without a word.

    overflows:      steps that were left out so far
    is_loss_finite: of the running step; where it is not, no scale mends it, and none is moved
    """

    def __init__(self, optimizer: ChainedOptimizer, config: Any) -> None:
        config.grad_scale_func = self.scale_loss
        parts = optimizer.chained_optimizers
        self._scaler: MegatronGradScaler = parts[0].grad_scaler
        self._has_many = len(parts) > 1
        self.overflows, self._in_a_row = 0, 0
        self.is_loss_finite = True
        for part in parts:
            part.grad_scaler = _Follower(self._scaler)
        optimizer.prepare_grads = partial(  # type: ignore[method-assign]
            self._prepare, optimizer.prepare_grads
        )

    def _prepare(self, prepare: Callable[[], bool]) -> bool:
        """Gradients without the scale; whether any overflowed, on any rank."""
        overflowed = prepare()
        if self._has_many:
            found = torch.tensor(float(overflowed), device=device())
            # each part has asked its own ranks alone
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
            overflowed = found.item() > 0
        self._used = self.value
        self._can_fall = self._scaler.scale > getattr(self._scaler, "min_scale", self._scaler.scale)
        if not self.is_loss_finite:
            return True
        self._scaler.update(overflowed)
        self.overflows += overflowed
        self._in_a_row = self._in_a_row + 1 if overflowed and not self._can_fall else 0
        return overflowed

    def scale_loss(self, loss: Tensor) -> Tensor:
        """What megatron-core calls with the last stage's loss before its backward pass."""
        return loss * self._scaler.scale

    @property
    def value(self) -> float:
        """The scale of the coming step."""
        return float(self._scaler.scale)

    def metrics(self) -> dict[str, float]:
        """The scale of the step that was done, and how many steps overflowed so far."""
        return {"loss_scale": self._used, "overflow_steps": self.overflows}

    def stop_if_stuck(self, step: int) -> None:
        """Errors: UserError when overflows cannot be mended by a lower scale."""
        if self._in_a_row >= PATIENCE:
            raise UserError(
                f"step {step}: gradients overflow fp16 at a loss scale of {self.value:g}, "
                f"{PATIENCE} steps in a row, and it cannot fall: lower optim.loss_scale or "
                "optim.min_loss_scale, or set model.dtype=bf16"
            )

    def state(self) -> dict[str, float]:
        """For the manifest: powers of two and counts, which JSON holds exactly."""
        state = {name: float(value) for name, value in self._scaler.state_dict().items()}
        return state | {"overflows": self.overflows}

    def load(self, state: dict[str, float]) -> None:
        """Go on from `state`; a fixed scale, which has none, stays as it is configured."""
        self.overflows = int(state.get("overflows", 0))
        if "scale" in state and self._scaler.state_dict():
            self._scaler.load_state_dict(
                {
                    "scale": torch.tensor([state["scale"]], device=device()),
                    "growth_tracker": int(state["growth_tracker"]),
                    "hysteresis_tracker": int(state["hysteresis_tracker"]),
                }
            )


def build_loss_scale(dtype: str, optimizer: ChainedOptimizer, config: Any) -> NoLossScale:
    """The scale of a run in `dtype`; `config` is its model's, whose schedules scale the loss."""
    return LossScale(optimizer, config) if dtype == "fp16" else NoLossScale()
