"""Learning-rate schedules: pure functions of the step, linear warm-up and then a shape.

Counting: `step` is 1 for the first optimizer update and `total_steps` for the last; the update
`step` uses what transformers' and verl's schedulers give after `step - 1` scheduler steps. So with
a warm-up the first update has learning rate 0, the peak is reached at update `warmup + 1`, and the
last update is one step short of `min_lr`. (Shifting by one would use the first update and waste the
last instead; the released numbers were made with this counting.)
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_deft.config import OptimConfig
from megatron_deft.errors import UserError

# (steps done since the warm-up ended, steps after the warm-up, wsd_decay_ratio) -> factor in [0, 1]
# between min_lr (0) and lr (1); at least one step comes after the warm-up.
Shape = Callable[[int, int, float], float]


def _half_cosine(done: int, steps: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done / steps))


def _cosine(done: int, steps: int, decay_ratio: float) -> float:
    return _half_cosine(done, steps)


def _linear(done: int, steps: int, decay_ratio: float) -> float:
    return 1.0 - done / steps


def _constant(done: int, steps: int, decay_ratio: float) -> float:
    return 1.0


def _wsd(done: int, steps: int, decay_ratio: float) -> float:
    # verl's get_wsd_schedule_with_warmup: the stable part is rounded down, the decay is a cosine.
    stable = int(steps * (1.0 - decay_ratio))
    return 1.0 if done < stable else _half_cosine(done - stable, steps - stable)


SCHEDULES: dict[str, Shape] = {
    "cosine": _cosine,
    "wsd": _wsd,
    "constant": _constant,
    "linear": _linear,
}


def warmup_length(optim: OptimConfig, total_steps: int) -> int:
    """Updates before the peak: warmup_steps, or total_steps * warmup_ratio rounded down (as verl).

    Errors: UserError when it is longer than the run; exactly as long as the run is legal.
    """
    if optim.warmup_steps is None:
        # 1e-9, because 0.29 * 100 is 28.999999999999996.
        return int(total_steps * optim.warmup_ratio + 1e-9)
    if optim.warmup_steps > total_steps:
        raise UserError(
            f"optim.warmup_steps={optim.warmup_steps}: must be <= the run's {total_steps} steps"
        )
    return optim.warmup_steps


def learning_rate(optim: OptimConfig, total_steps: int, step: int) -> float:
    """Learning rate of the optimizer update number `step`, 1 <= step <= total_steps.

    Linear from 0 to `lr` in the warm-up, then from `lr` towards `min_lr` in the shape of
    SCHEDULES[optim.schedule] ("constant" stays at `lr`). A run of one step without warm-up uses
    `lr`. It depends on nothing but its arguments, so a resumed run continues exactly.

    Errors: UserError when the warm-up is longer than the run.
    """
    assert 1 <= step <= total_steps, f"step {step} outside 1..{total_steps}"
    warmup = warmup_length(optim, total_steps)
    done = step - 1
    if done < warmup:
        return optim.lr * done / warmup
    factor = SCHEDULES[optim.schedule](done - warmup, total_steps - warmup, optim.wsd_decay_ratio)
    return optim.min_lr + (optim.lr - optim.min_lr) * factor
