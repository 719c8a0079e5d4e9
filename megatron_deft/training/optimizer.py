"""megatron-core's optimizer for a run, its learning rate, and its state's way in and out of a
checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_deft.config import OptimConfig, RunConfig

# Layout-free: gathers each parameter's state on one data-parallel rank while saving.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def wrap_model(cfg: RunConfig, model: GPTModel) -> DistributedDataParallel:
    """The model as megatron-core's schedules and optimizer want it: fp32 gradient buffers."""
    inner = Float16Module(model.config, model) if cfg.model.dtype == "bf16" else model
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        overlap_grad_reduce=cfg.parallel.overlap_grad_reduce,
        grad_reduce_in_fp32=True,
    )
    return DistributedDataParallel(model.config, ddp_config, inner)


def build_optimizer(cfg: RunConfig, model: DistributedDataParallel) -> MegatronOptimizer:
    """AdamW as configured; weight decay on matrices, not on norms and biases (Megatron's rule)."""
    optim = cfg.optim
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=cfg.model.dtype == "bf16",
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        ),
        [model],
    )


def set_hyper_parameters(optimizer: MegatronOptimizer, optim: OptimConfig, lr: float) -> None:
    """Give every parameter group what it needs for the coming step.

    megatron-core leaves lr_mult and wd_mult (0 for norms and biases) to whoever schedules. A group
    that came out of a checkpoint follows the configuration as well.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = optim.betas, optim.eps


def create_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam the (zero) state it otherwise makes at its first step.

    megatron-core 0.16 cannot say what to load before that state exists, its step counter above
    all.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, torch.optim.Adam):
            for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
                part.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load what `dist_checkpointing.load` made of the optimizer's sharded_state_dict.

    torch's Adam counts steps in a tensor per parameter, which megatron-core 0.16 neither hands back
    when loading nor keeps apart afterwards: without the two repairs here it raises KeyError
    'step', or all parameters share one counter that then advances once per parameter.
    """
    with _step_is_kept():
        optimizer.load_state_dict(state)
    for inner in torch_states(optimizer):
        if isinstance(inner.get("step"), Tensor):
            inner["step"] = inner["step"].clone()


def torch_states(optimizer: MegatronOptimizer) -> Iterator[dict[str, Any]]:
    """The state of every parameter of every torch optimizer inside `optimizer`."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield from part.optimizer.state.values()


@contextmanager
def _step_is_kept() -> Iterator[None]:
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def keep_step(self: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        own = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        original(self, model_param, {**{k: own[k] for k in own if k == "step"}, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = keep_step
    try:
        with torch.no_grad():
            yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = original
