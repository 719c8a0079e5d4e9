"""What Megatron-LM expects of its vocab-parallel cross-entropy holds for `nll`."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft import token_loss
from tests.distributed import run_ranks

# tests/unit_tests/tensor_parallel/test_cross_entropy.py of Megatron-LM: 0..7 over and over
LOGITS = torch.arange(8.0).repeat(16, 16)
TARGET = torch.arange(0, 32, 2)
EXPECTED = torch.tensor([10.2309, 8.2309, 6.2309, 4.2309] * 4)


def values(rank: int, world: int) -> Tensor:
    width = LOGITS.shape[1] // world
    local = LOGITS[:, rank * width : (rank + 1) * width]
    return token_loss(local, TARGET, "nll", group=dist.group.WORLD)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_expected_values(world: int) -> None:
    for loss in run_ranks(world, values):
        torch.testing.assert_close(loss, EXPECTED, rtol=0, atol=1e-4)


def beside_megatron(rank: int, world: int, fused: bool) -> list[tuple[Tensor, Tensor]]:
    from megatron_deft import platform

    platform.initialize(tensor=world)
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(5, 3, 96, generator=generator) * 4
    labels = torch.randint(0, 96, (5, 3), generator=generator)
    upstream = torch.rand(5, 3, generator=generator)
    width = 96 // world
    local = whole[..., rank * width : (rank + 1) * width]
    results = []
    for ours in (False, True):
        leaf = local.clone().requires_grad_(True)
        logits = leaf * 1.0  # theirs overwrites what it is given
        if ours:
            loss = token_loss(logits, labels, "nll", group=group)
        elif fused:
            loss = fused_vocab_parallel_cross_entropy(logits, labels, group)
        else:
            loss = vocab_parallel_cross_entropy(logits, labels)
        (loss * upstream).sum().backward()
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    return results


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_values_and_gradients_of_the_installed_megatron_core(world: int, fused: bool) -> None:
    for theirs, ours in run_ranks(world, beside_megatron, fused):
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=2e-6)
        # the fused one rounds its gradient to bf16
        rounding = 2**-8 if fused else 1e-5
        torch.testing.assert_close(ours[1], theirs[1], rtol=rounding, atol=1e-6)
