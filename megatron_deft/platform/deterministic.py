"""Bit-identical numbers from run to run: what has to be set for it, in one place.

torch raises where an operation has no deterministic form, instead of computing on. Its attention
has one, and so has TransformerEngine's where it is asked. The package's own operators are always
deterministic: their sums have one order, and the only atomic of the CUDA ones hands out places in a
buffer that is sorted before it is read (csrc/cuda/block_topk.cuh).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from megatron_deft.errors import UserError

# Variable -> values under which results repeat; the first is set where there is none.
ENVIRONMENT: Mapping[str, tuple[str, ...]] = {
    # cuBLAS: a workspace for each stream
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # TransformerEngine: no attention kernel that adds up in any order
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    # NCCL: no reduction inside the switch, and not the one that happens to be faster
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
}


@contextmanager
def deterministic(is_asked: bool) -> Iterator[None]:
    """Inside the block, if asked, every operation repeats to the last bit.

    Enter it before anything else asks for a GPU or starts torch.distributed.
    Errors: UserError for a variable of the environment that is set otherwise.
    """
    if not is_asked:
        yield
        return
    for name, legal in ENVIRONMENT.items():
        if os.environ.setdefault(name, legal[0]) not in legal:
            raise UserError(
                f"deterministic=true, but the environment has {name}={os.environ[name]}: unset it, "
                f"or set {' or '.join(legal)}"
            )
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
