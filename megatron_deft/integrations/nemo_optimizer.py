"""What NeMo 2.7.3 asks megatron-core's optimizer for, under names that 0.16 no longer has."""

from collections.abc import Callable
from inspect import signature
from typing import Any

from megatron.core import optimizer

from megatron_deft.errors import UserError

# the arguments, and what they are where they say nothing
_GONE = {"no_weight_decay_cond": None, "scale_lr_cond": None, "lr_mult": 1.0}


def mend_optimizer() -> None:
    """Let NeMo make megatron-core's optimizer, for the rest of the process; once is enough.

    NeMo passes three arguments that megatron-core has replaced by config_overrides, also where they
    say nothing, and would end in a TypeError before the first step. Nothing is done for a
    megatron-core that takes them.

    Errors, when the optimizer is made: UserError for an argument that does say something.
    """
    make = optimizer.get_megatron_optimizer
    parameters = signature(make).parameters
    if not _GONE.keys() <= parameters.keys() and not hasattr(make, "mended"):
        optimizer.get_megatron_optimizer = _without_gone(make)


def _without_gone(make: Callable[..., Any]) -> Callable[..., Any]:
    def get_megatron_optimizer(*args: Any, **options: Any) -> Any:
        given = {name: options.pop(name) for name in _GONE.keys() & options.keys()}
        wrong = sorted(name for name, value in given.items() if value != _GONE[name])
        if wrong:
            raise UserError(
                f"{', '.join(wrong)} of the recipe's optim: megatron-core 0.16 has no such "
                "argument: leave it out"
            )
        return make(*args, **options)

    get_megatron_optimizer.mended = True  # type: ignore[attr-defined]
    return get_megatron_optimizer
