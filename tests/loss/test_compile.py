"""torch.compile takes token_loss as a whole, in-place forms too, and gives the same gradient."""

import pytest
import torch
from torch import Tensor

from megatron_deft import token_loss


def loss(hidden: Tensor, weight: Tensor, labels: Tensor, form: dict[str, bool]) -> Tensor:
    return token_loss(hidden @ weight, labels, "deft", **form)


@pytest.mark.parametrize(
    "form",
    [{}, {"inplace_backward": True}, {"inplace_backward": True, "grad_in_forward": True}],
    ids=["two passes", "in place", "single read"],
)
def test_one_graph_with_the_same_gradient(form: dict[str, bool]) -> None:
    torch._dynamo.reset()
    hidden = torch.randn(7, 8, requires_grad=True)
    weight = torch.randn(8, 33, requires_grad=True)
    labels = torch.arange(7)
    labels[3] = -100
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    plain = loss(hidden, weight, labels, form)
    want = torch.autograd.grad(plain.sum(), (hidden, weight))
    got = compiled(hidden, weight, labels, form)
    torch.testing.assert_close(got, plain)
    for ours, theirs in zip(torch.autograd.grad(got.sum(), (hidden, weight)), want, strict=True):
        torch.testing.assert_close(ours, theirs)
    labels[0] = 33  # a compiled graph cannot raise: the wrong label's loss is nan
    wrong = compiled(hidden, weight, labels, form)
    assert wrong.isnan().tolist() == [True] + [False] * 6


def test_fake_tensors() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        logits = torch.empty(5, 3, 99, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(5, 3, dtype=torch.long)
        for op in (torch.ops.megatron_deft.row_stats, torch.ops.megatron_deft.row_stats_grad):
            gate = [1, 0, 1e-6, 0, 1, 0, 1, 0]
            rest = (0, 99, -100) if op is torch.ops.megatron_deft.row_stats else (gate, 99, -100)
            out = op(logits.detach(), labels, *rest)
            stats = out if isinstance(out, torch.Tensor) else out[0]
            assert stats.shape == (5, 15)
            assert stats.dtype == torch.float32


@pytest.mark.parametrize("single", [False, True])
def test_token_loss_on_fake_and_meta_tensors(single: bool) -> None:
    from torch._subclasses import FakeTensorMode

    for mode, device in ((FakeTensorMode(), "cpu"), (torch.device("meta"), "meta")):
        with mode:
            logits = torch.empty(5, 3, 99, requires_grad=True, device=device)
            labels = torch.zeros(5, 3, dtype=torch.long, device=device)
            loss = token_loss(logits, labels, grad_in_forward=single)
            loss.sum().backward()
            assert loss.shape == (5, 3)
            assert logits.grad is not None
            assert logits.grad.shape == logits.shape
