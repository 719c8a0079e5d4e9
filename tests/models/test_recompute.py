"""Recomputation: the same gradients to the last bit, dropout replayed, and less that is kept."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Qwen3MoeConfig

from megatron_deft.models.build import build_model, transformer_config
from megatron_deft.models.families import spec_from_hf
from megatron_deft.platform import initialize, seed_everything, shutdown
from tests.convert.tiny_models import COMMON

SHAPE: dict[str, Any] = {**COMMON, "vocab_size": 100, "num_key_value_heads": 2}
MODELS = {
    "dense": LlamaConfig(**SHAPE),
    # scores are held: no fused attention caps them
    "softcap": Gemma2Config(**SHAPE, head_dim=8, query_pre_attn_scalar=8),
    "experts": Qwen3MoeConfig(
        **SHAPE, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
        mlp_only_layers=[2],
    ),
}  # fmt: skip
SELECTIVE = {"recompute": "selective"}
ALL = {**SELECTIVE, "recompute_modules": ("core_attn", "layernorm", "mlp", "moe")}
FULL = {"recompute": "full"}
TOKENS = torch.randint(100, (2, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def model_parallel() -> Iterator[None]:
    initialize(seed=3)
    yield
    shutdown()


def run(name: str, dropout: float, dtype: str, **recompute: Any) -> tuple[list[torch.Tensor], int]:
    """Gradients of a training step, and the bytes kept for its backward pass."""
    spec = spec_from_hf(MODELS[name].to_dict())
    drop = {"attention_dropout": dropout, "hidden_dropout": dropout}
    config = transformer_config(spec, dtype=dtype, **drop, **recompute)
    seed_everything(0)
    model = build_model(spec, config, vocab_pad_multiple=1).to(config.params_dtype).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[id(storage)] = storage
        return tensor

    seed_everything(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(TOKENS, torch.arange(64).expand(2, 64), None)
    # by address: several views may be kept of one; what was dropped is empty by now
    kept = {storage.data_ptr(): storage.nbytes() for storage in saved.values() if storage.nbytes()}
    logits.float().logsumexp(-1).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None], sum(kept.values())


def modules(*names: str) -> dict[str, Any]:
    return {**SELECTIVE, "recompute_modules": names}


@pytest.mark.parametrize(("dropout", "dtype"), [(0.0, "bf16"), (0.2, "bf16"), (0.2, "fp32")])
@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("dense", modules("layernorm")),
        ("dense", modules("mlp")),
        ("softcap", modules("core_attn")),
        ("softcap", modules("layernorm", "mlp")),
        ("experts", modules("moe")),
        ("experts", ALL),
        ("dense", FULL),
        ("dense", {**FULL, "recompute_layers": 2}),
        ("dense", {**FULL, "recompute_layers": 1, "recompute_method": "block"}),
        ("experts", FULL),
    ],
)
def test_same_gradients_and_less_kept(
    name: str, recompute: dict[str, Any], dropout: float, dtype: str
) -> None:
    plain, everything = run(name, dropout, dtype)
    again, kept = run(name, dropout, dtype, **recompute)
    assert kept < 0.95 * everything, (kept, everything)
    assert len(plain) == len(again)
    # torch's fp32 norm takes another way where no gradient is asked for
    rounds = dtype == "fp32" and "layernorm" in recompute.get("recompute_modules", ())
    rtol, atol = (2e-6, 2e-6) if rounds else (0, 0)
    for ours, theirs in zip(again, plain, strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=rtol, atol=atol)


def test_what_is_kept_in_order() -> None:
    """More modules, less memory; whole layers least, the fewer inputs the less."""
    choices = [
        {},
        modules("layernorm"),
        modules("layernorm", "mlp"),
        {**FULL, "recompute_method": "block", "recompute_layers": 3},
        FULL,
        {**FULL, "recompute_layers": 4},
    ]
    kept = [run("dense", 0.0, "bf16", **choice)[1] for choice in choices]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)
    # attention with dropout holds its weights, on the CPU
    assert run("dense", 0.2, "bf16", **modules("core_attn"))[1] < run("dense", 0.2, "bf16")[1]
