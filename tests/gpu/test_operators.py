"""The CUDA operators against their plain twins and the float64 oracle; skipped without a GPU."""

import pytest
import torch

from megatron_deft import token_loss
from megatron_deft.ops import native, reference
from tests.oracle import SPECS, loss_and_grad

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_extension_has_cuda_kernels() -> None:
    assert "cuda" in native.devices(), native.missing("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "valid"), [(1, 1), (33, 30), (5003, 5000), (8, 0)])
def test_operators_equal_their_twins(columns: int, valid: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(columns)
    logits = (torch.randn(13, columns, generator=generator) * 5).to(dtype).cuda()
    labels = torch.randint(-3, columns + 3, (13,), generator=generator).cuda()
    labels[4] = -100
    shard = (0, valid, -100)
    got, want = (ops.row_stats(logits, labels, *shard) for ops in (native, reference))
    torch.testing.assert_close(got, want, rtol=5e-6, atol=1e-6)
    rows = (want[0].contiguous(), torch.rand(13).cuda(), torch.rand(13).cuda())
    got, want = (ops.gate_grad(logits, labels, *rows, *shard) for ops in (native, reference))
    torch.testing.assert_close(got, want, rtol=2**-7 if dtype != torch.float32 else 5e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS)
def test_token_loss_against_float64(spec: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(24, 512, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, 507, (24,), generator=generator)
    labels[1::5] = -100
    want, want_grad, keep, _ = loss_and_grad(spec, logits, labels, 507, torch.ones(24))
    leaf = logits.cuda().requires_grad_(True)
    loss, stats = token_loss(leaf, labels.cuda(), spec, vocab_size=507, return_stats=True)
    loss.sum().backward()
    assert torch.equal(stats.keep.cpu(), keep)
    torch.testing.assert_close(loss.detach().cpu().double(), want, rtol=1e-5, atol=2e-6)
    assert leaf.grad is not None
    ulp = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(leaf.grad.cpu().double(), want_grad, rtol=1.01 * ulp, atol=1e-6)
