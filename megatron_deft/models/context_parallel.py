"""Documents cut over context-parallel ranks: rank r holds chunks r and 2 size - 1 - r of each.

Every rank gathers all keys and values of a layer and attends with its own queries, as Llama 3 was
trained (arXiv 2407.21783, 3.3.2). Rejected: passing keys and values round a ring, which holds
fewer of them at once (here all of one layer, which grouped queries keep small beside the
activations), but needs the attention's partial sums to be merged and a backward pass by hand, for
which torch has no public operator. TransformerEngine's attention has both and does its own.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


def held(length: int, size: int, rank: int) -> tuple[tuple[int, int], ...]:
    """Which positions [start, end) of a document of `length` the rank holds, in its order."""
    if size == 1:
        return ((0, length),)
    chunk = length // (2 * size)
    return tuple((i * chunk, (i + 1) * chunk) for i in (rank, 2 * size - 1 - rank))


def gather(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...] of each rank -> [ranks, n, ...] on every rank; gradients are summed over ranks."""
    # Of sequence parallelism, but the same operation: forward all-gather, backward reduce-scatter.
    whole = gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=True, group=group)
    return whole.unflatten(0, (group.size(), -1))


def in_order(parts: Tensor) -> Tensor:
    """[ranks, documents, length / ranks, ...], every rank's part -> [documents, length, ...]."""
    first, second = parts.unflatten(2, (2, -1)).unbind(2)
    return torch.cat([first, second.flip(0)]).transpose(0, 1).flatten(1, 2)
