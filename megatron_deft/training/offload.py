"""Optimizer state in host memory, updated there: megatron-core's HybridDeviceOptimizer.

It is made of torch's AdamW for the share of parameters that the CPU updates and the GPU's Adam for
the rest, and shows their state by parameter. megatron-core 0.16 trains with it; what it cannot do
is done here: make its state before the first step, and load it. Its own loading fails with fp32
weights (`param_to_fp32_param` has none), keeps every rank's moments as views of the whole ones it
read, and without TransformerEngine takes the GPU's state to the CPU.
"""

import gc
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

MASTER = "master_param"  # beside the moments in the hybrid optimizer's state: the fp32 weight


def build_offloaded(
    config: OptimizerConfig, model: Sequence[DistributedDataParallel], fraction: float
) -> ChainedOptimizer:
    """get_megatron_optimizer with that fraction of each rank's state and updates on the CPU.

    config: of the distributed optimizer; the other replaces the parameters that it has given to
            HybridDeviceOptimizer
    """
    config.optimizer_cpu_offload = config.overlap_cpu_optimizer_d2h_h2d = True
    config.optimizer_offload_fraction = fraction
    # The fp32 weights of 16-bit ones live where their moments do, and not on the GPU as well. It is
    # what use_precision_aware_optimizer is for, which insists on TransformerEngine.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = config.bf16 or config.fp16
    # An fp32 weight's shard is a view of it, and with gradients no leaf: torch would refuse it.
    with torch.no_grad():
        chained = get_megatron_optimizer(config, list(model))
    # A first one, of whole parameters instead of this rank's shards, stands in a circle.
    gc.collect()
    for part in chained.chained_optimizers:
        part.init_state_fn = init_state
        part.optimizer._sync_hdo_state_to_sub_optimizers = partial(_take_loaded, part.optimizer)
    return chained


def inner_optimizers(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Those that hold the state: the optimizer itself, if it is not hybrid."""
    if isinstance(optimizer, HybridDeviceOptimizer):
        return list(optimizer.sub_optimizers)
    return [optimizer]


def init_state(hybrid: HybridDeviceOptimizer, config: Any = None) -> None:
    """Zero moments, as megatron-core's `init_state_fn` of the other optimizers makes them."""
    for optimizer in hybrid.sub_optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                state = optimizer.state[weight]
                if not state:
                    state |= {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
    hybrid._sync_sub_optimizers_state_to_hdo()


def _take_loaded(hybrid: HybridDeviceOptimizer) -> None:
    """What DistributedOptimizer calls when it has loaded the hybrid optimizer's state.

    It has put tensors of the checkpoint in place of the moments and of the fp32 weight of a 16-bit
    one; an fp32 weight it has loaded into the model.
    """
    for optimizer in hybrid.sub_optimizers:
        for weight, state in optimizer.state.items():
            weight.data.copy_(state.pop(MASTER, hybrid.inner_param_to_orig_param[weight]))
            for name, moment in state.items():
                state[name] = moment.to(weight.device, copy=True)
    hybrid._sync_sub_optimizers_state_to_hdo()
