"""NeMo's own training on a machine without a GPU."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nemo.collections.llm.peft import lora, utils
from nemo.lightning import nemo_logger
from nemo.lightning.io import pl

from megatron_deft.platform import cpu


def _called_from(depth: int) -> bool:
    """Whether the caller `depth` frames up is megatron-core or NeMo."""
    name = str(sys._getframe(depth + 1).f_globals.get("__name__", ""))
    return name.startswith(("megatron.core", "nemo."))


class _NemosCudaMeansCpu(cpu._CudaMeansCpu):
    """NeMo's training loop spells its device "cuda" as well, and logs by tensor.to("cuda")."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.to and args[1:] == ("cuda",) and _called_from(1):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def nemo_on_cpu() -> Iterator[None]:
    """megatron-core and NeMo's training loop, checkpoints and adapters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_CudaMeansCpu", _NemosCudaMeansCpu)
        # the subclass's method stands between the caller and the one that asks
        patch.setattr(cpu, "_called_from_megatron", lambda: _called_from(2) or _called_from(3))
        # the ranks wait by it for the first one's index of the samples
        patch.setattr(torch.cuda, "LongTensor", torch.LongTensor)
        # the last step of loading moves tensors to the GPU
        patch.setattr(pl, "_fix_tensors_device", lambda checkpoint: checkpoint)
        if not lora.HAVE_TE:  # LoRA asks every layer whether it is TransformerEngine's
            patch.setattr(lora, "te", SimpleNamespace(Linear=None))
            patch.setattr(utils, "HAVE_TE", False)  # megatron-core has the names without it
        if not nemo_logger.HAVE_RES:  # whose callback it looks for beside every ModelCheckpoint
            patch.setattr(nemo_logger, "lcp", SimpleNamespace(LocalCheckpointCallback=()))
        with cpu.cpu_platform():
            yield
