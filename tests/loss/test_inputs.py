"""What token_loss is given: strides, process groups that do not fit, bad input."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft import token_loss
from megatron_deft.errors import UserError
from megatron_deft.loss.inputs import check_tensors
from tests.distributed import run_ranks


def views(logits: Tensor) -> dict[str, Tensor]:
    s, b, v = logits.shape
    wide = torch.zeros(s + 1, b, v + 3)
    wide[:s, :, :v] = logits
    by_batch = wide.transpose(0, 1).contiguous()
    return {
        "padded rows": wide[:s, :, :v],
        "all but the last": by_batch[:, :-1, :v].transpose(0, 1),
        "transposed": logits.transpose(0, 1).contiguous().transpose(0, 1),
        "every second row": torch.stack([logits, logits], 1).flatten(0, 1)[::2],
        "vocabulary first": logits.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "three strides": torch.zeros(2, 2, 2, 2, 3, 2, v)[:, 0, :, 0, :, 0].copy_(
            logits.reshape(2, 2, b, v)
        ),
    }


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("name", views(torch.zeros(4, 3, 2)))
def test_strides(name: str, single: bool, inplace: bool) -> None:
    """Rows of two strides are walked as they lie, in place too; other logits are copied."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, 17), torch.randint(0, 17, (4, 3))
    view = views(logits)[name].detach().requires_grad_(True)
    assert not view.is_contiguous() or name == "every second row"
    labels = labels.reshape(view.shape[:-1])
    is_walked = name not in ("vocabulary first", "three strides")
    taken = check_tensors(view, labels, False)[0]
    assert (taken.data_ptr() == view.data_ptr()) is is_walked
    if inplace and not is_walked:
        with pytest.raises(UserError, match="at most two strides"):
            token_loss(view, labels, inplace_backward=True)
        return
    whole = logits.clone().requires_grad_(True)
    upstream = torch.rand(4, 3)
    form = {"inplace_backward": inplace, "grad_in_forward": single}
    want = token_loss(whole, labels.reshape(4, 3), grad_in_forward=single)
    got = token_loss(view, labels, **form).reshape(4, 3)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    (got * upstream).sum().backward()
    (want * upstream).sum().backward()
    torch.testing.assert_close(view.grad.reshape(4, 3, 17), whole.grad, rtol=0, atol=0)


def test_expanded_logits_and_stride_zero_upstream() -> None:
    row = torch.randn(1, 13, requires_grad=True)
    labels = torch.tensor([1, 5, 7])
    token_loss(row.expand(3, 13), labels).sum().backward()  # sum: upstream of stride 0
    other = row.detach().repeat(3, 1).requires_grad_(True)
    token_loss(other, labels).sum().backward()
    assert other.grad is not None
    torch.testing.assert_close(row.grad, other.grad.sum(0, keepdim=True))


MISMATCHES: dict[str, dict[str, Any]] = {
    "columns": {"columns": 61}, "vocab_size": {"vocab_size": 122}, "tokens": {"tokens": 4},
    "objective": {"objective": "eaft"}, "ignore_index": {"ignore_index": -1},
    "dtype": {"dtype": torch.bfloat16}, "sum of the labels": {"first": 7},
}  # fmt: skip


def mismatched(rank: int, world: int) -> dict[str, str]:
    """Rank 1 differs from rank 0 in one thing; every rank must say so, and nobody waits."""
    messages = {}
    for name, change in MISMATCHES.items():
        mine = {"columns": 62, "vocab_size": 123, "tokens": 3, "objective": "nll", "first": 5}
        mine |= {"ignore_index": -100, "dtype": torch.float32} | (change if rank else {})
        logits = torch.randn(mine["tokens"], mine["columns"], dtype=mine["dtype"])
        labels = torch.tensor([mine["first"], 0, 61, 60])[: mine["tokens"]]
        with pytest.raises(UserError) as caught:
            token_loss(
                logits,
                labels,
                mine["objective"],
                group=dist.group.WORLD,
                vocab_size=mine["vocab_size"],
                ignore_index=mine["ignore_index"],
            )
        messages[name] = str(caught.value)
    return messages


def test_ranks_that_disagree_are_refused_on_every_rank() -> None:
    for messages in run_ranks(2, mismatched):
        for name, message in messages.items():
            assert f"expected the same {name} on every rank, got [" in message
            assert "pass the tensor-parallel group" in message


LOGITS = torch.zeros(2, 3, 8)
LABELS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("named", "call"),
    [
        ("float64", lambda: token_loss(LOGITS.double(), LABELS)),
        (r"\[2, 3\].*\[6\]", lambda: token_loss(LOGITS, LABELS.reshape(-1))),
        ("int64 or int32", lambda: token_loss(LOGITS, LABELS.float())),
        ("expected 0 to 7.*got 8", lambda: token_loss(LOGITS, LABELS + 8)),
        ("expected 0 to 4.*got 5", lambda: token_loss(LOGITS, LABELS + 5, vocab_size=5)),
        ("got -1", lambda: token_loss(LOGITS, LABELS - 1)),
        ("vocab_size: expected 1 to 8", lambda: token_loss(LOGITS, LABELS, vocab_size=9)),
        ("vocab_size: expected 1 to 8", lambda: token_loss(LOGITS, LABELS, vocab_size=0)),
        (
            "vocab_size: expected an int, got 8.0",
            lambda: token_loss(LOGITS, LABELS, vocab_size=8.0),
        ),
        ("labels: expected a tensor, got list", lambda: token_loss(LOGITS[0], [1, 2, 3])),
        ("logits: expected a strided", lambda: token_loss(LOGITS.to_sparse(), LABELS)),
        ("legal are", lambda: token_loss(LOGITS, LABELS, "cross-entropy")),
        (
            "at most two strides",
            lambda: token_loss(
                LOGITS.transpose(0, 2), torch.zeros(8, 3).long(), inplace_backward=True
            ),
        ),
        (
            "rows lie apart",
            lambda: token_loss(
                torch.zeros(1, 8).expand(3, 8), torch.zeros(3).long(), inplace_backward=True
            ),
        ),
    ],
)
def test_bad_input_is_one_clear_line(named: str, call: Any) -> None:
    with pytest.raises(UserError, match=named) as caught:
        call()
    assert "\n" not in str(caught.value)
