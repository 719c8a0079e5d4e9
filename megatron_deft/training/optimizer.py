"""megatron-core's optimizer for a run, its learning rate, and its state's way in and out of a
checkpoint.

In a checkpoint every tensor of the optimizer has the name and the sharding of its parameter
(`optimizer.state.exp_avg.decoder.layers...`), so any layout can load it. megatron-core's own
sharded_state_dict was rejected as a whole: it puts experts' states under `chained_1.` when they are
spread over ranks and under no prefix when they are not, loads parameter groups only into as many as
were saved, cannot save a stage that has no experts, and with torch's Adam loses the step.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_deft.config import OptimConfig, RunConfig
from megatron_deft.platform import device
from megatron_deft.training.offload import MASTER, build_offloaded, inner_optimizers


class GuardedOptimizer(ChainedOptimizer):
    """megatron-core's optimizer, but a step whose loss or gradient is not finite changes nothing.

    step() then returns (False, gradient norm, None): weights, moments and number of steps are bit
    by bit what they were. All ranks know the norm, so all do alike. megatron-core's own skip
    (`found_inf`, with a norm of None) is that of a loss scaler, where an overflow is no fault.
    Rejected: check_for_nan_in_grad, which asks the device once per bucket and ends the rank.

    may_step: false where the loss, or a gradient that is in no norm, is known not to be finite
    """

    may_step = True
    norm = 0.0

    def get_grad_norm(self) -> float:
        """The norm of all gradients before they are clipped."""
        self.norm = float(super().get_grad_norm() or 0.0)
        return self.norm

    def step_with_ready_grads(self) -> bool:
        """Step, if there is nothing against it; whether it did."""
        if not (self.may_step and math.isfinite(self.norm)):
            return False
        return bool(super().step_with_ready_grads())


def build_optimizer(cfg: RunConfig, model: Sequence[DistributedDataParallel]) -> GuardedOptimizer:
    """AdamW as configured; weight decay on matrices, not on norms and biases (Megatron's rule).

    It has one part, and one more for experts that are spread over ranks.
    """
    optim = cfg.optim
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=cfg.model.dtype == "bf16",
        fp16=cfg.model.dtype == "fp16",
        fp8_recipe=cfg.model.fp8,
        loss_scale=optim.loss_scale,
        initial_loss_scale=optim.initial_loss_scale,
        min_loss_scale=optim.min_loss_scale,
        loss_scale_window=optim.loss_scale_window,
        hysteresis=optim.hysteresis,
        params_dtype=model[0].config.params_dtype,
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
    )
    chained = (
        build_offloaded(config, model, optim.cpu_offload)
        if optim.cpu_offload
        else get_megatron_optimizer(config, list(model))
    )
    return GuardedOptimizer(chained.chained_optimizers)


def has_finite_rest(model: Sequence[DistributedDataParallel]) -> Tensor:
    """Whether those gradients are finite that get_grad_norm leaves to another rank: bool [].

    Norms' weights, of which each tensor-parallel rank has its own, and the second one of a tied
    embedding: gone wrong on this rank alone, they would be in no norm.
    """
    rest = [
        parameter.main_grad
        for chunk in model
        for parameter in chunk.parameters()
        if parameter.requires_grad
        and not (
            param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
        )
    ]
    if not rest:
        return torch.ones((), dtype=torch.bool, device=device())
    return torch.stack(torch._foreach_norm(rest)).isfinite().all()


def set_hyper_parameters(optimizer: MegatronOptimizer, optim: OptimConfig, lr: float) -> None:
    """Give every parameter group what it needs for the coming step.

    megatron-core leaves lr_mult and wd_mult (0 for norms and biases) to whoever schedules.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = optim.weight_decay * group["wd_mult"]
        group["betas"], group["eps"] = optim.betas, optim.eps


def sharded_state(
    optimizer: ChainedOptimizer, model_state: Mapping[str, Any], *, is_loading: bool = False
) -> dict[int, Any]:
    """What dist_checkpointing saves of the optimizer, or loads: the tensors of each parameter.

    The first moment, the second, and the fp32 weight where the model's own is not in fp32 (with the
    distributed optimizer always). Number of steps and hyper-parameters are functions of the run's
    position and configuration.

    model_state: sharded_state_dict of every chunk of the model
    is_loading:  make the (zero) state that torch's optimizer otherwise makes at its first step, and
                 gather nothing; made as well where every step so far was skipped
    returns:     by part of the optimizer; `restore` takes what dist_checkpointing.load made of it
    """
    for part in optimizer.chained_optimizers:
        if is_loading or not part.optimizer.state:
            part.init_state_fn(part.optimizer, part.config)
            if not is_loading:
                _set_step(part.optimizer, 0)
    tensors = {
        number: _distributed_sharded_state(part, model_state, is_loading)
        if isinstance(part, DistributedOptimizer)
        else _plain_sharded_state(part, model_state)
        for number, part in enumerate(optimizer.chained_optimizers)
    }
    # A part whose parameters all are on other pipeline stages has none here.
    return {number: entries for number, entries in tensors.items() if entries}


def bytes_to_save(cfg: RunConfig, optimizer: ChainedOptimizer) -> int:
    """How large a checkpoint will be, a little more: what tensor ranks share is counted for each.

    Every rank calls it.
    """
    distributed, weight = cfg.parallel.distributed_optimizer, 2 if cfg.model.dtype == "bf16" else 4
    moments, master = 8, 4 * (distributed or weight == 2)
    numbers = sum(p.numel() for part in optimizer.chained_optimizers for p in part.get_parameters())
    total = torch.tensor(numbers, dtype=torch.int64, device=device())
    dist.all_reduce(total)
    copies = 1 if distributed else parallel_state.get_data_parallel_world_size()
    return int(total) * (weight + moments + master) // copies


def restore(optimizer: ChainedOptimizer, loaded: Mapping[int, Any], step: int) -> None:
    """Put loaded tensors in their places in an optimizer that has done `step` steps.

    step: without the skipped ones
    """
    for number, part in enumerate(optimizer.chained_optimizers):
        tensors = loaded.get(number, {})
        # torch's Adam counts in a tensor beside the moments, which megatron-core would look for.
        # The hybrid one shows the fp32 weight there too.
        for state in part.optimizer.state.values():
            state.pop("step", None)
            state.pop(MASTER, None)
        with torch.no_grad():
            if isinstance(part, DistributedOptimizer):
                part.load_parameter_state_from_fully_reshardable(tensors)
            else:
                for index, (_, places) in enumerate(_plain_tensors(part)):
                    for name, place in places.items():
                        place.copy_(tensors[index][name])
        _set_step(part.optimizer, step)


def steps(optimizer: ChainedOptimizer) -> set[int]:
    """The numbers of steps that the parameters have seen: one number."""
    counts: set[int] = set()
    parts = optimizer.chained_optimizers
    for inner in chain.from_iterable(inner_optimizers(part.optimizer) for part in parts):
        counts |= {int(state["step"]) for state in inner.state.values() if "step" in state}
        # TransformerEngine's and apex's Adam count by group, and only where there are parameters
        groups = (group for group in inner.param_groups if group["params"])
        counts |= {int(group["step"]) for group in groups if "step" in group}
    return counts


def _set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    for inner in inner_optimizers(optimizer):
        if isinstance(inner, torch.optim.Adam):
            is_fused = inner.param_groups[0]["fused"]  # then it counts where the weight is
            for weight, state in inner.state.items():
                where = weight.device if is_fused else None
                state["step"] = torch.tensor(float(step), device=where)
        else:
            for group in inner.param_groups:
                group["step"] = step


def _distributed_sharded_state(
    part: DistributedOptimizer, model_state: Mapping[str, Any], is_loading: bool
) -> dict[int, Any]:
    """megatron-core 0.16 gathers a buffer's state without the padding after each of its buckets,
    and then looks for a parameter where it is with it: from the second bucket on, every tensor
    would be saved shifted. So while it gathers, parameters are where it puts them."""
    padded = [buffer.param_index_map for buffer in part.buffers]
    for buffer in part.buffers:
        unpadded = accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0)
        places = zip(buffer.bucket_indices, unpadded, strict=False)
        shifts = [start - gathered for (start, _), gathered in places]
        buffer.param_index_map = {
            parameter: (start - shifts[bucket], end - shifts[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        found: dict[int, Any] = part.sharded_param_state_fully_reshardable(
            model_state, is_loading=is_loading, metadata={}
        )
        return found
    finally:
        for buffer, before in zip(part.buffers, padded, strict=True):
            buffer.param_index_map = before


def _plain_tensors(part: MegatronOptimizer) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Each parameter of the model with its tensors in an optimizer that is not distributed."""
    masters: dict[Tensor, Tensor] = {}
    if isinstance(part, Float16OptimizerWithFloat16Params):
        groups = zip(part.fp32_from_float16_groups, part.float16_groups, strict=True)
        masters = dict(chain.from_iterable(zip(*group, strict=True) for group in groups))
    for parameter in part.get_parameters():
        state = part.optimizer.state[parameter]
        tensors = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
        if parameter in masters:
            tensors["fp32_param"] = parameter
        yield masters.get(parameter, parameter), tensors


def _plain_sharded_state(
    part: MegatronOptimizer, model_state: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    sharded, _ = extract_sharded_tensors_and_factories(dict(model_state))
    of = {id(entry.data): entry for entry in nested_values(sharded)}
    return {
        index: {
            name: make_sharded_optimizer_tensor(
                of[id(parameter)], tensor, f"optimizer.state.{name}"
            )
            for name, tensor in tensors.items()
        }
        for index, (parameter, tensors) in enumerate(_plain_tensors(part))
    }
