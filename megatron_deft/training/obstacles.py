"""What a run asks for that this machine lacks: said before anything is prepared, and by --dry-run.

Nothing heavy is imported for a run that asks for none of it.
"""

import importlib.util

from megatron_deft.config import MonitorConfig, RunConfig
from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec


def obstacles(cfg: RunConfig, spec: ModelSpec) -> list[str]:
    """Of each key that cannot be honoured by a rank here one line: key, value, reason, remedy."""
    comm, fuses = cfg.parallel.context_comm, cfg.parallel.gradient_accumulation_fusion is True
    if not (cfg.model.fp8 or cfg.optim.cpu_offload or fuses or comm in ("p2p", "a2a")):
        return []
    from megatron_deft.platform import import_megatron

    import_megatron()
    from megatron_deft.models import accelerators as has

    asked: dict[str, str] = {}
    if cfg.model.fp8 is not None:
        why = has.obstacle_to_fp8(cfg.model.fp8)
        asked[f"model.fp8={cfg.model.fp8}: {why}; set it to null"] = why
    if cfg.optim.cpu_offload:
        why = has.obstacle_to_cpu_offload()
        asked[f"optim.cpu_offload={cfg.optim.cpu_offload:g}: {why}; set it to 0"] = why
    if fuses:
        why = has.obstacle_to_gradient_accumulation_fusion()
        key = "parallel.gradient_accumulation_fusion"
        asked[f"{key}=true: {why}; set it to auto or false"] = why
    if comm is not None:
        why = has.obstacle_to_context_comm(comm, spec)
        asked[f"parallel.context_comm={comm}: {why}; set it to all_gather or null"] = why
    return [line for line, why in asked.items() if why]


def obstacles_to_monitors(monitor: MonitorConfig) -> list[str]:
    """The same of rank 0, which alone writes metrics."""
    asked = {"tensorboard": monitor.tensorboard is True, "wandb": monitor.wandb}
    return [
        f"monitor.{package}=true, but {package} is not installed: `pip install {package}`, or set "
        "it to false"
        for package, is_asked in asked.items()
        if is_asked and not is_installed(package)
    ]


def is_installed(package: str) -> bool:
    """Whether it can be found, without importing it."""
    return importlib.util.find_spec(package) is not None


def refuse(lines: list[str]) -> None:
    """Errors: UserError of the first line, if there is one."""
    if lines:
        raise UserError(lines[0])
