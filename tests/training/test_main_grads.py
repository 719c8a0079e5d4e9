"""Gradients of 16-bit models are summed in fp32, micro-batch by micro-batch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from megatron_deft.models.families import spec_from_hf
from megatron_deft.platform import initialize, shutdown
from megatron_deft.training.model import build_chunks, wrap_chunks
from tests.convert.tiny_models import COMMON
from tests.training.ranks import config

MICRO_BATCHES = 48


@pytest.fixture(autouse=True)
def model_parallel() -> Iterator[None]:
    initialize(seed=3)
    yield
    shutdown()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_micro_batches_are_summed_in_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Exactly: the sum is that of the single gradients in fp32, in order, to the last bit."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    spec = spec_from_hf(LlamaConfig(**COMMON, vocab_size=96, num_key_value_heads=2).to_dict())
    cfg = config(tmp_path, tmp_path / "run", **{"model.dtype": name})
    (model,) = wrap_chunks(cfg, build_chunks(cfg, spec))
    parameters = dict(model.named_parameters())
    assert {p.dtype for p in parameters.values()} == {dtype}
    batches = torch.randint(96, (MICRO_BATCHES, 2, 8))
    places = torch.arange(8).expand(2, 8)

    def add(tokens: torch.Tensor) -> None:
        model(tokens, places, None).float().logsumexp(-1).sum().backward()

    single = []
    for tokens in batches:
        model.zero_grad_buffer()
        add(tokens)
        single.append({key: p.main_grad.clone() for key, p in parameters.items()})
    model.zero_grad_buffer()
    for tokens in batches:
        add(tokens)
    rounded = 0
    for key, parameter in parameters.items():
        assert parameter.main_grad.dtype == torch.float32
        total = torch.zeros_like(parameter.main_grad)
        coarse = torch.zeros_like(total, dtype=dtype)
        for gradients in single:
            total += gradients[key]
            coarse += gradients[key].to(dtype)
        assert torch.equal(parameter.main_grad, total), key
        rounded += not torch.equal(coarse.float(), total)
    assert rounded > len(parameters) / 2, "a sum in 16 bits would have been another"
