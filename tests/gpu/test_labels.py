"""Labels out of range on CUDA: no read out of bounds, no wait; nan and a count later."""

import subprocess
import sys

import pytest
import torch

from megatron_deft import token_loss
from megatron_deft.errors import UserError
from megatron_deft.loss.inputs import raise_on_wrong_labels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("grad_in_forward", [False, True])
@pytest.mark.parametrize("wrong", [507, 2**40, -1, -(2**40)])
def test_a_label_out_of_range_is_nan_and_is_told_later(wrong: int, grad_in_forward: bool) -> None:
    raise_on_wrong_labels()  # nothing yet
    logits = torch.randn(4, 512, device="cuda", requires_grad=True)
    labels = torch.tensor([1, wrong, -100, 506], device="cuda")
    loss = token_loss(logits, labels, vocab_size=507, grad_in_forward=grad_in_forward)
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False, False]
    with pytest.raises(UserError, match="labels: 1 on cuda:0 were neither in the vocabulary nor"):
        raise_on_wrong_labels()
    raise_on_wrong_labels()  # told once


@pytest.mark.parametrize("at", range(3))
def test_rows_on_another_device_are_refused(at: int) -> None:
    rows = [torch.zeros(2, device="cuda") for _ in range(3)]
    rows[at] = rows[at].cpu()
    logits, labels = torch.zeros(2, 4, device="cuda"), torch.zeros(2, device="cuda").long()
    with pytest.raises(ValueError, match="expected device cuda:0, got cpu"):
        torch.ops.megatron_deft.gate_grad(logits, labels, *rows, 0, 4, -100)


CAPTURE = """
import torch
from megatron_deft import token_loss
from megatron_deft.loss.inputs import raise_on_wrong_labels
logits, labels = torch.randn(4, 64, device="cuda"), torch.arange(4, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    loss = token_loss(logits, labels)
raise_on_wrong_labels()
labels[1] = 64
graph.replay()
assert loss.isnan().tolist() == [False, True, False, False], loss
raise_on_wrong_labels()
"""


def test_a_first_call_inside_a_graph_capture_counts_nothing() -> None:
    """The counter would be the graph's: undefined before its first replay, zero at each."""
    subprocess.run([sys.executable, "-c", CAPTURE], check=True, timeout=120)
