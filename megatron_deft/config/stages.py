"""How layers may be divided among pipeline stages: the rules of megatron-core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_deft.errors import UserError

if TYPE_CHECKING:
    from megatron_deft.config.model import ParallelConfig

COUNTED = ("account_for_embedding", "account_for_loss")
GIVEN = ("first_stage_layers", "last_stage_layers")


def divisors(size: int) -> str:
    """The legal numbers of equal parts, for a message."""
    return ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)


def check_stages(parallel: ParallelConfig, num_layers: int | None) -> None:
    """Refuse what cannot divide `num_layers` (None: unknown) among pipeline stages.

    Errors: UserError, one line naming key, value and what is legal.
    """
    counted = [f"parallel.{name}=true" for name in COUNTED if getattr(parallel, name)]
    given = [f"parallel.{n}={getattr(parallel, n)}" for n in GIVEN if getattr(parallel, n)]
    uneven = " and ".join(counted + given)
    if uneven and parallel.pipeline == 1:
        raise UserError(
            f"{uneven} with parallel.pipeline=1: layers are divided among pipeline processes; "
            "drop it, or set parallel.pipeline to 2 or more"
        )
    if counted and given:
        raise UserError(
            f"{uneven}: stages are counted out or given, not both; drop the one or the other"
        )
    if num_layers is None:
        return
    stages = _given(parallel, num_layers, uneven) if given else _counted(parallel, num_layers)
    for stage in sorted(stages):
        if stage % parallel.chunks:
            what = "layers" + "".join(f", {name} counted" for name in counted)
            raise UserError(
                f"parallel.virtual_pipeline={parallel.chunks}: must divide the {stage} {what} of a "
                f"pipeline stage: {divisors(stage)}"
            )


def _counted(parallel: ParallelConfig, num_layers: int) -> set[int]:
    """Layers of a stage, the embedding and the loss counted as one each where it is asked for."""
    counted = [name for name in COUNTED if getattr(parallel, name)]
    total = num_layers + len(counted)
    if total % parallel.pipeline:
        added = "".join(f" + 1 (parallel.{name})" for name in counted)
        raise UserError(
            f"parallel.pipeline={parallel.pipeline}: must divide the model's {num_layers} layers"
            f"{added}: {divisors(total)}; or divide them unevenly with parallel.{COUNTED[0]}, "
            f"{COUNTED[1]}, {GIVEN[0]} or {GIVEN[1]}"
        )
    return {total // parallel.pipeline}


def _given(parallel: ParallelConfig, num_layers: int, uneven: str) -> set[int]:
    """Layers of the first and last stage as given, and of those between them."""
    ends = [size for name in GIVEN if (size := getattr(parallel, name))]
    rest, stages = num_layers - sum(ends), parallel.pipeline - len(ends)
    what = f"{uneven} with parallel.pipeline={parallel.pipeline} and a model of {num_layers} layers"
    if stages == 0 and rest:
        raise UserError(f"{what}: together they must be {num_layers}")
    if stages and (rest < stages or rest % stages):
        raise UserError(
            f"{what}: must leave the {stages} other stages at least one layer each, equally many"
        )
    return {*ends, rest // stages} if stages else {*ends}
