"""What `token_loss` is given: checked, and described as the operators read it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensor

from megatron_deft.errors import UserError
from megatron_deft.objectives import Gate, Objective

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shard:
    """Which slice of the vocabulary the logits are, and where the other slices live."""

    start: int
    valid: int
    vocab_size: int
    ignore_index: int
    group: dist.ProcessGroup | None

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds the whole vocabulary."""
        return self.group is None or dist.get_world_size(self.group) == 1


def check_tensors(logits: Tensor, labels: Tensor, inplace_backward: bool) -> tuple[Tensor, Tensor]:
    """The tensors as the kernels read them: int64 labels, rows of at most two strides."""
    for name, value in (("logits", logits), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise UserError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise UserError(
                f"{name}: expected a strided tensor, got {value.layout}; call .to_dense()"
            )
    if logits.dtype not in DTYPES:
        raise UserError(
            f"logits: expected one of {', '.join(str(d) for d in DTYPES)}, got {logits.dtype}; "
            "convert them with .float()"
        )
    if logits.shape[:-1] != labels.shape or logits.dim() == 0:
        raise UserError(
            f"labels: expected shape {list(logits.shape[:-1])} (the logits' without the last "
            f"dimension), got {list(labels.shape)}"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise UserError(f"labels: expected int64 or int32, got {labels.dtype}; call .long()")
    if labels.device != logits.device:
        raise UserError(f"labels: expected device {logits.device}, got {labels.device}")
    if not _rows_are_regular(logits):
        if inplace_backward:
            raise UserError(
                "inplace_backward needs logits whose rows lie apart, with at most two strides, got "
                f"shape {list(logits.shape)} with strides {list(logits.stride())}; "
                "call .contiguous() or leave inplace_backward out"
            )
        logits = logits.contiguous()
    return logits, labels.long()


def check_strided(**named: object) -> None:
    """Strided tensors, on the device of the first; what is None was left out."""
    device = None
    for name, value in named.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            got = value.layout if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{name}: expected a strided tensor, got {got}")
        device = device or value.device
        if value.device != device:
            raise UserError(f"{name}: expected device {device}, got {value.device}")


def check_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    sequence_group: dist.ProcessGroup | None,
) -> Tensor:
    """Hidden states, a head's weight and labels that belong together; the labels in int64.

    sequence_group: the ranks that share the first dimension of the hidden states, if they do
    """
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise UserError(
            "hidden, weight: expected [..., H] and [V_local, H], got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    if weight.dtype not in DTYPES or hidden.dtype != weight.dtype:
        raise UserError(
            f"hidden, weight: expected one dtype of {', '.join(str(d) for d in DTYPES)}, got "
            f"{hidden.dtype} and {weight.dtype}; convert one of them"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"bias: expected shape {[weight.shape[0]]}, got {list(bias.shape)}")
    expected = list(hidden.shape[:-1])
    if sequence_group is not None:
        if not expected:
            raise UserError("sequence_parallel needs hidden states with a dimension to split")
        expected[0] *= dist.get_world_size(sequence_group)
    if list(labels.shape) != expected:
        raise UserError(
            f"labels: expected shape {expected} (of the hidden states of all ranks, without H), "
            f"got {list(labels.shape)}"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise UserError(f"labels: expected int64 or int32, got {labels.dtype}; call .long()")
    return labels.long()


def check_numbers(softcap: float | None, chunk_tokens: int | None, kept_tokens: int | None) -> None:
    """The numbers of `fused_linear_loss` that may be left out."""
    if softcap is not None and not (isinstance(softcap, int | float) and 0 < softcap < math.inf):
        raise UserError(f"softcap: expected a finite number > 0 or None, got {softcap!r}")
    for name, value, least in (("chunk_tokens", chunk_tokens, 1), ("kept_tokens", kept_tokens, 0)):
        if value is not None and not (type(value) is int and value >= least):
            raise UserError(f"{name}: expected an int >= {least} or None, got {value!r}")


def check_token_weight(token_weight: Tensor | None, labels: Tensor, reduction: str) -> Tensor:
    """The weights as [N] fp32; ones where there are none."""
    if reduction not in ("sum", "none"):
        raise UserError(f"reduction={reduction}: legal are sum, none")
    if token_weight is None:
        return torch.ones(labels.numel(), device=labels.device)
    if reduction == "none":
        raise UserError('token_weight: not with reduction="none"; multiply the losses by it')
    if not isinstance(token_weight, Tensor) or not token_weight.is_floating_point():
        got = getattr(token_weight, "dtype", type(token_weight).__name__)
        raise UserError(f"token_weight: expected a tensor of floats, got {got}")
    if token_weight.requires_grad:
        raise UserError("token_weight is a constant and gets no gradient; call .detach()")
    if token_weight.shape != labels.shape or token_weight.device != labels.device:
        raise UserError(
            f"token_weight: expected shape {list(labels.shape)} on {labels.device}, like the "
            f"labels, got {list(token_weight.shape)} on {token_weight.device}"
        )
    return token_weight.reshape(-1).float()


def check_main_grad(parameter: Tensor | None) -> None:
    """The parameter has room for its gradient; None: not asked for."""
    if parameter is None:
        return
    place = getattr(parameter, "main_grad", None)
    if not isinstance(place, Tensor):
        raise UserError("main_grad=True needs weight.main_grad, a tensor; this weight has none")
    if place.shape != parameter.shape:
        raise UserError(
            f"weight.main_grad: expected shape {list(parameter.shape)}, got {list(place.shape)}"
        )


def _rows_are_regular(logits: Tensor) -> bool:
    """Whether the kernels can walk the rows [..., V], with two strides, and none overlap."""
    if logits.numel() == 0 or logits.is_contiguous():
        return True
    columns = logits.shape[-1]
    if columns > 1 and logits.stride(-1) != 1:
        return False
    runs: list[tuple[int, int]] = []  # (stride, rows), inner first
    for size, stride in zip(logits.shape[-2::-1], logits.stride()[-2::-1], strict=True):
        if runs and stride == runs[-1][0] * runs[-1][1]:
            runs[-1] = (runs[-1][0], runs[-1][1] * size)
        elif size > 1:
            runs.append((stride, size))
    end = columns  # of what the runs so far reach over
    for stride, size in sorted(runs):
        if stride < end:
            return False
        end = stride * (size - 1) + end
    return len(runs) <= 2


def shard_of(
    columns: int,
    dtype: torch.dtype,
    labels: Tensor,
    objective: Objective,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
    ignore_index: int,
    options: Mapping[str, object] | None = None,
) -> Shard:
    """Where this rank's columns of logits of `dtype` lie in the vocabulary.

    options: of the caller, by name, which the ranks must agree on as well
    """
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    if rank < 0:
        raise UserError("group: this process is not a member of the given process group")
    vocab_size = columns * ranks if vocab_size is None else vocab_size
    if not isinstance(vocab_size, int):
        raise UserError(f"vocab_size: expected an int, got {vocab_size!r}")
    if ranks > 1:
        _check_same_on_all_ranks(
            columns, dtype, labels, objective, vocab_size, ignore_index, group, options or {}
        )
    if not 0 < vocab_size <= columns * ranks:
        raise UserError(
            f"vocab_size: expected 1 to {columns * ranks} ({ranks} rank(s) x {columns} columns), "
            f"got {vocab_size}"
        )
    start = rank * columns
    return Shard(start, min(max(vocab_size - start, 0), columns), vocab_size, ignore_index, group)


_agreed: set[tuple[dist.ProcessGroup | None, int, int]] = set()


def _check_same_on_all_ranks(
    columns: int,
    dtype: torch.dtype,
    labels: Tensor,
    objective: Objective,
    vocab_size: int,
    ignore_index: int,
    group: dist.ProcessGroup | None,
    options: Mapping[str, object],
) -> None:
    """The ranks hold shards of one batch; asked once for each size of shard: a step costs nothing.

    Before any check that one rank alone could fail: the others would wait in the all-gather. The
    labels tell a data-parallel group, given by mistake, from a tensor-parallel one.
    """
    key = (group, columns, vocab_size)
    if key in _agreed or torch.compiler.is_compiling():
        return
    weights = torch.arange(1, labels.numel() + 1, device=labels.device)
    mine = {
        "columns": columns,
        "vocab_size": vocab_size,
        "tokens": labels.numel(),
        "dtype": str(dtype),
        "objective": objective.spec,
        "ignore_index": ignore_index,
        "sum of the labels": int((labels.reshape(-1) * weights).sum()),
        **options,
    }
    found: list[dict[str, object]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    for name in mine:
        if len({rank[name] for rank in found}) > 1:
            raise UserError(
                f"group: expected the same {name} on every rank, got "
                f"{[rank[name] for rank in found]}; pass the tensor-parallel group, whose ranks "
                "hold equal shards (pad the vocabulary so that they divide it) of the same tokens"
            )
    _agreed.add(key)


_wrong_labels: dict[torch.device, Tensor] = {}  # how many were seen on a CUDA device


def check_labels(labels: Tensor, shard: Shard) -> Tensor | None:
    """Every label is in the vocabulary or ignored: an error on the CPU.

    On CUDA asking would stop the stream: the wrong ones are counted there, and returned as a mask;
    their loss is nan, and `raise_on_wrong_labels` tells the count when the caller can wait for it.
    Under torch.compile the mask, and the nan, are all there is.
    """
    legal = ((labels >= 0) & (labels < shard.vocab_size)) | (labels == shard.ignore_index)
    wrong = ~legal
    if torch.compiler.is_compiling() or labels.is_meta or isinstance(labels, FakeTensor):
        return wrong  # neither an answer nor a counter fits into a graph
    if labels.is_cuda:
        if (counter := _wrong_label_counter(labels.device)) is not None:
            counter.add_(wrong.sum())
        return wrong
    if bool(wrong.any()):
        first = labels[wrong][0].item()
        raise UserError(
            f"labels: expected 0 to {shard.vocab_size - 1} (vocab_size {shard.vocab_size}) or "
            f"ignore_index {shard.ignore_index}, got {first}; {_LABELS_REMEDY}"
        )
    return None


def _wrong_label_counter(device: torch.device) -> Tensor | None:
    """The device's counter; None inside a first CUDA-graph capture, which must not own it."""
    if device not in _wrong_labels:
        if torch.cuda.is_current_stream_capturing():
            return None
        _wrong_labels[device] = torch.zeros((), dtype=torch.int64, device=device)
        torch.cuda.current_stream(device).synchronize()  # once, so that every stream sees the zero
    return _wrong_labels[device]


_LABELS_REMEDY = (
    "check that tokenizer and model share one vocabulary, and that ignored tokens use ignore_index"
)


def raise_on_wrong_labels() -> None:
    """Raise UserError if a label out of range was given on a CUDA device since the last call.

    Waits for the device: call it where the step's metrics are read, not in the step.
    """
    for device, counter in _wrong_labels.items():
        count = int(counter)
        if count:
            counter.zero_()
            raise UserError(
                f"labels: {count} on {device} were neither in the vocabulary nor ignore_index; "
                f"{_LABELS_REMEDY}"
            )


def check_batch_group(objective: Objective, batch_group: dist.ProcessGroup | None) -> None:
    """The data-parallel mean needs to be told which ranks it is over."""
    if objective.batch_mean != "data_parallel" or batch_group is not None:
        return
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            f"objective {objective.spec} takes the mean of p over the data-parallel ranks: pass "
            "their process group as batch_group, or use cayley(floor=micro_batch)"
        )


def gate_of(
    objective: Objective, shard: Shard, logits: Tensor, grad_in_forward: bool
) -> Gate | None:
    """The gate for the single-read form, or None for the form of two passes.

    Errors: UserError naming what stands against making the gradient in the forward.
    """
    if not grad_in_forward:
        return None
    obstacle = obstacle_to_single_read(objective, shard.is_whole, logits.dtype)
    if obstacle:
        raise UserError(f"grad_in_forward: {obstacle}; leave grad_in_forward out")
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return None  # no gradient is wanted, and the logits are left alone
    return objective.gate(shard.vocab_size)


def obstacle_to_single_read(objective: Objective, is_whole: bool, dtype: torch.dtype) -> str:
    """Why the gradient cannot be made in the forward, or "" if it can."""
    if not is_whole:
        return "the vocabulary is split over tensor-parallel ranks, whose sums come first"
    if objective.gate(vocab_size=2) is None:
        return f"objective {objective.spec} needs a mean over the batch before any gradient"
    if dtype == torch.float16:
        return "a float16 gradient needs the loss scale before it is rounded"
    return ""
