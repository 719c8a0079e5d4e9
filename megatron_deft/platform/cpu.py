"""Lets megatron-core run on CPU + gloo, for tests, small runs and machines without a GPU.

megatron-core 0.16 spells its device "cuda" in schedules, optimizer, gradient buffers, RNG tracker
and checkpoint reader. Nothing in it needs a GPU beyond that spelling, so each spelling is
redirected: every redirection below says which call of megatron-core asks for it. Where CUDA is
available the whole file does nothing.

Rejected: a patched copy of megatron-core (one per version), a `torch` proxy inside each of its
modules (some twenty, some imported late), `torch.set_default_device` (leaves an explicit
device="cuda" alone).
"""

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

_stack: ExitStack | None = None  # what undoes the redirections; None while they are not in force


def import_megatron() -> None:
    """Import megatron-core, fit for a machine without a GPU; best before anything else imports it.

    Without it everything works that works without a GPU, except next to TransformerEngine, and
    starts three seconds later. Does nothing special with CUDA.
    """
    if torch.cuda.is_available() or "megatron.core" in sys.modules:
        importlib.import_module("megatron.core")
        return
    # TransformerEngine raises RuntimeError where it finds no GPU, and megatron-core expects an
    # ImportError: a container that ships it could not convert a checkpoint on a CPU node. None in
    # sys.modules is Python's own way to say that a package is not there.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    # megatron-core decorates its fused functions with torch.compile, which loads the compiler at
    # import and would call for a C++ one at run time. Uncompiled they are plain torch.
    compile_function = torch.compile
    torch.compile = _leave_uncompiled  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*")
            for name in ("core", "core.models.gpt", "core.optimizer", "core.distributed"):
                importlib.import_module(f"megatron.{name}")
    finally:
        torch.compile = compile_function  # type: ignore[assignment]


def _leave_uncompiled(function: Any = None, **options: Any) -> Any:
    return function if function is not None else _leave_uncompiled


class _CudaMeansCpu(TorchFunctionMode):
    """Answers megatron-core's own requests for a CUDA tensor with a CPU one.

    A mode sees every torch call of its thread, whichever module makes it and however late it is
    imported. Only callers inside megatron-core are answered: a user who writes device="cuda" still
    gets torch's error. Costs about 3 microseconds per torch call.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # torch.zeros([], device="cuda") in schedules, clip_grads, optimizer, param_and_grad_buffer;
        # torch.empty_like(t, device="cuda") in dist_checkpointing.
        if "device" in kwargs and _is_cuda(kwargs["device"]) and _called_from_megatron():
            kwargs = {**kwargs, "device": CPU}
        # weight.data.cuda() for tied embeddings, tensor.cuda() in dist_checkpointing: identity.
        elif func is torch.Tensor.cuda and _called_from_megatron():
            return args[0]
        # torch.tensor(..., device="cpu", pin_memory=True) for the rotary positions of a
        # context-parallel rank: only memory that a GPU reads can be pinned.
        elif "pin_memory" in kwargs and _called_from_megatron():
            kwargs = {**kwargs, "pin_memory": False}
        # The optimizers sort parameters by `param.type() == "torch.cuda.FloatTensor"`.
        elif func is torch.Tensor.type and not (args[1:] or kwargs) and _called_from_megatron():
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    """Torch's _engine_run_backward with the mode in force.

    torch.autograd.backward is itself a torch call that modes see, and while a mode handles a call
    it is switched off: hooks, recomputation and everything else in a backward pass would go unseen.
    On the CPU the engine works on the calling thread and with its modes.
    """
    with _CudaMeansCpu():
        return torch.autograd.graph._engine_run_backward(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return str(device).startswith("cuda")


def _called_from_megatron() -> bool:
    """Whether the torch call that the mode is looking at stands in megatron-core's source.

    Frame 0 is this function, 1 the mode, 2 the caller: torch enters the mode from C.
    """
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.core")


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: Tensor, device: Any = None, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


class _Stream:
    """The one order in which a CPU does things, for who would put copies on a stream of their own.

    It is its own event: both are there only to be waited for.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = None  # type: ignore[assignment]

    def wait_stream(self, stream: "_Stream") -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self) -> "_Stream":
        """Something to synchronize with."""
        return self


def _counts(counts: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Counts of tokens: all-to-all wants numbers, and megatron-core leaves a CPU tensor alone."""
    return counts.numpy() if as_numpy and isinstance(counts, Tensor) else counts


def _gather_unequal(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """mappings._gather_along_first_dim for parts of several lengths, which gloo refuses."""

    def gather(
        own: Tensor, group: Any, sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return original(own, group, sizes, use_global_buffer)
        output = own.new_empty(sum(sizes), *own.shape[1:])
        for rank, part in enumerate(output.split(sizes)):
            if rank == group.rank():
                part.copy_(own)
            if part.numel():
                dist.broadcast(part, group=group, group_src=rank)
        return output

    return gather


def _reduce_scatter_unequal(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """mappings._reduce_scatter_along_first_dim for parts of several lengths, likewise."""

    def reduce_scatter(
        whole: Tensor, group: Any, sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return original(whole, group, sizes, use_global_buffer)
        total = whole.clone(memory_format=torch.contiguous_format)
        if total.numel():
            dist.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()]

    return reduce_scatter


def _is_real_warning(record: logging.LogRecord) -> bool:
    """False for the RNG tracker's complaint that the CPU generator moved: here it has to."""
    return "CPU RNG state changed" not in record.getMessage()


def _redirect() -> ExitStack:
    """Put every redirection in force and return the stack that takes them back."""
    import_megatron()
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import token_dispatcher

    redirections: list[tuple[Any, str, Any]] = [
        # torch.empty(..., device=torch.cuda.current_device()): layers, mappings, p2p, buffers.
        (torch.cuda, "current_device", lambda: CPU),
        # After p2p (batch_p2p_sync) and around checkpoints: gloo's wait() has already finished.
        (torch.cuda, "synchronize", lambda device=None: None),
        # The dispatcher of experts' tokens copies their counts to the host beside the computation.
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "current_stream", lambda device=None: _Stream()),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _counts),
        # It gathers the tokens of a tensor rank's experts, more from one rank than from another.
        *(
            (mappings, name, replace(getattr(mappings, name)))
            for name, replace in (
                ("_gather_along_first_dim", _gather_unequal),
                ("_reduce_scatter_along_first_dim", _reduce_scatter_unequal),
            )
        ),
        (torch.autograd, "_engine_run_backward", _run_backward),
        # The RNG tracker keeps one generator state per kind of parallelism and swaps them in the
        # CUDA generator; here it swaps them in the CPU generator, the one that draws.
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", _get_rng_state),
        (torch.cuda, "set_rng_state", _set_rng_state),
        # It sets states through torch._C and default_generators, which a CPU build lacks. Full
        # recomputation replays dropout through these two as well.
        (random, "_get_cuda_rng_state", _get_rng_state),
        (random, "_set_cuda_rng_state", _set_rng_state),
    ]
    logger = logging.getLogger(random.__name__)
    with ExitStack() as stack:
        for owner, name, replacement in redirections:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        logger.addFilter(_is_real_warning)
        stack.callback(logger.removeFilter, _is_real_warning)
        stack.enter_context(_CudaMeansCpu())
        return stack.pop_all()


def enter_cpu_platform() -> None:
    """Redirect megatron-core to the CPU from here on. Idempotent; no-op with CUDA."""
    global _stack
    if _stack is None and not torch.cuda.is_available():
        _stack = _redirect()


def leave_cpu_platform() -> None:
    """Take the redirections back. Idempotent."""
    global _stack
    if _stack is not None:
        stack, _stack = _stack, None
        stack.close()


@contextmanager
def cpu_platform() -> Iterator[None]:
    """Redirect megatron-core to the CPU inside the block; blocks nest. No-op with CUDA."""
    entered = _stack is None
    enter_cpu_platform()
    try:
        yield
    finally:
        if entered:
            leave_cpu_platform()
