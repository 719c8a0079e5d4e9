"""GPTModel against transformers' model with the same weights."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_deft.models import accelerators
from megatron_deft.models.accelerators import obstacle_to_context_comm
from megatron_deft.models.attention import TorchAttention
from megatron_deft.models.build import build_model, padded_vocab, transformer_config
from megatron_deft.models.families import ModelSpec, spec_from_hf
from megatron_deft.models.rotary import inverse_frequencies
from megatron_deft.platform import initialize, shutdown
from tests.models.weights import copy_weights

VOCAB_PAD = 16
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, **changes})


CONFIGS: dict[str, PretrainedConfig] = {
    "gqa": llama(),
    "mha": llama(num_key_value_heads=8),
    "mqa": llama(num_key_value_heads=1),
    "tied": llama(tie_word_embeddings=True),
    "wide heads": llama(head_dim=12),
    "llama3": llama(rope_theta=50.0, rope_scaling=LLAMA3),
    "linear": llama(rope_scaling={"rope_type": "linear", "factor": 3.0}),
    "attention bias": llama(attention_bias=True),
    "mlp bias": llama(mlp_bias=True),
    "every bias": llama(attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
}


@pytest.fixture(autouse=True, scope="module")
def model_parallel() -> Iterator[None]:
    initialize(seed=3)
    yield
    shutdown()


def pair(config: PretrainedConfig) -> tuple[ModelSpec, PreTrainedModel, GPTModel]:
    """transformers' model with random weights, biases and norms, and ours with the same."""
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in hf.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    spec = spec_from_hf(config.to_dict())
    gpt = build_model(spec, transformer_config(spec), vocab_pad_multiple=VOCAB_PAD).eval()
    copy_weights(spec, hf, gpt)
    return spec, hf, gpt


@pytest.mark.parametrize("name", CONFIGS)
def test_same_logits_gradients_and_parameters_as_transformers(name: str) -> None:
    spec, hf, gpt = pair(CONFIGS[name])
    padding = padded_vocab(spec.vocab_size, VOCAB_PAD, 1) - spec.vocab_size
    padded_tables = 1 if spec.tied_embeddings else 2
    assert (padding, gpt.vocab_size) == (11, 112)
    assert (
        sum(p.numel() for p in gpt.parameters())
        == sum(p.numel() for p in hf.parameters()) + padding * spec.hidden_size * padded_tables
    )

    tokens = torch.randint(0, spec.vocab_size, (2, 33))
    theirs = hf(input_ids=tokens).logits
    positions = torch.arange(33).expand(2, -1)
    ours = gpt(tokens, positions, None)
    assert ours.shape == (2, 33, gpt.vocab_size)
    torch.testing.assert_close(ours[..., : spec.vocab_size], theirs, rtol=1e-4, atol=1e-5)

    gradient = torch.randn_like(theirs)
    (theirs * gradient).sum().backward()
    (ours[..., : spec.vocab_size] * gradient).sum().backward()
    for module, theirs_module in (
        (gpt.embedding.word_embeddings, hf.model.embed_tokens),
        (gpt.decoder.final_layernorm, hf.model.norm),
    ):
        expected = theirs_module.weight.grad
        found = module.weight.grad[: expected.size(0)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_bf16_is_as_near_as_transformers_own_bf16() -> None:
    spec, hf, _ = pair(CONFIGS["gqa"])
    tcfg = transformer_config(spec, dtype="bf16")
    gpt = build_model(spec, tcfg, vocab_pad_multiple=VOCAB_PAD).eval()
    copy_weights(spec, hf.bfloat16(), gpt)
    assert {p.dtype for p in gpt.parameters()} == {torch.bfloat16}
    tokens = torch.randint(0, spec.vocab_size, (2, 33))
    with torch.no_grad():
        ours = gpt(tokens, torch.arange(33).expand(2, -1), None)[..., : spec.vocab_size].float()
        theirs = hf(input_ids=tokens).logits.float()
        exact = hf.float()(input_ids=tokens).logits
    assert (ours - exact).std() < 1.5 * (theirs - exact).std()


@pytest.mark.parametrize("original_length", [8192, 4096])
@pytest.mark.parametrize("factor", [8.0, 32.0])  # Llama 3.1 and 3.2
@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (2.0, 8.0)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama3_frequencies_are_transformers_to_the_last_bit(
    original_length: int, factor: float, low: float, high: float, head_dim: int
) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original_length,
    }
    config = llama(
        head_dim=head_dim, rope_theta=500000.0, rope_scaling=scaling, max_position_embeddings=131072
    )
    spec = spec_from_hf(config.to_dict())
    expected = LlamaRotaryEmbedding(config=config).inv_freq
    assert torch.equal(inverse_frequencies(spec), expected)
    unscaled = llama(head_dim=head_dim, rope_theta=500000.0)
    assert not torch.equal(expected, inverse_frequencies(spec_from_hf(unscaled.to_dict())))


@pytest.mark.parametrize("theta", [10000.0, 1000000])
def test_plain_and_linear_frequencies_are_transformers(theta: float) -> None:
    for scaling in (None, {"rope_type": "linear", "factor": 2.5}):
        config = llama(rope_theta=theta, rope_scaling=scaling)
        expected = LlamaRotaryEmbedding(config=config).inv_freq
        assert torch.equal(inverse_frequencies(spec_from_hf(config.to_dict())), expected)


def test_frequencies_stay_float32_in_a_bf16_model() -> None:
    spec = spec_from_hf(CONFIGS["llama3"].to_dict())
    gpt = build_model(spec, transformer_config(spec, dtype="bf16")).bfloat16()
    assert torch.equal(gpt.rotary_pos_emb.inv_freq, inverse_frequencies(spec))


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "tensor", "expected"),
    [
        (128256, 128, 1, 128256),
        (128256, 128, 4, 128512),
        (151936, 128, 8, 152576),
        (5, 1, 1, 5),
        (5, 1, 2, 6),
    ],
)
def test_padded_vocab(vocab_size: int, multiple: int, tensor: int, expected: int) -> None:
    assert padded_vocab(vocab_size, multiple, tensor) == expected


def attention(cls: type[torch.nn.Module], **options: Any) -> torch.nn.Module:
    spec = spec_from_hf(CONFIGS["gqa"].to_dict())
    tcfg = transformer_config(spec, attention_dropout=options.pop("dropout", 0.0))
    for name in ("window_size", "context_parallel_size"):
        if name in options:
            setattr(tcfg, name, options.pop(name))
    defaults = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    return cls(tcfg, **{**defaults, **options})


def qkv(length: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(length, 2, 8, 8), torch.randn(length, 2, 2, 8), torch.randn(length, 2, 2, 8)


@pytest.mark.parametrize("softmax_scale", [None, 0.7])
def test_attention_is_megatrons(softmax_scale: float | None) -> None:
    inputs = qkv()
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
    ours = attention(TorchAttention, softmax_scale=softmax_scale)(*inputs, None)
    theirs = attention(DotProductAttention, softmax_scale=softmax_scale)(*inputs, mask)
    assert ours.shape == (9, 2, 64)
    torch.testing.assert_close(ours, theirs)


def test_attention_drops_in_training_only() -> None:
    inputs = qkv()
    module = attention(TorchAttention, dropout=0.5)
    assert not torch.equal(module(*inputs, None), module(*inputs, None))
    mean = torch.stack([module(*inputs, None) for _ in range(2000)]).mean(0)
    exact = module.eval()(*inputs, None)
    assert torch.equal(exact, module(*inputs, None))
    torch.testing.assert_close(mean, exact, rtol=0, atol=0.2)


def test_attention_refuses_by_name_what_it_cannot_do() -> None:
    query, key, value = qkv()
    module = attention(TorchAttention)
    for call, name in (
        (lambda: module(query, key, value, torch.ones(9, 9)), "attention_mask"),
        (lambda: module(query, key, value, None, packed_seq_params=1), "packed_seq_params"),
        (lambda: module(query[:1], key, value, None), "key/value cache"),
        (lambda: module(query, key, value, None, AttnMaskType.padding), "attn_mask_type"),
        (lambda: attention(TorchAttention, window_size=(4, 1)), "window_size"),
        (
            lambda: attention(TorchAttention, context_parallel_size=2, dropout=0.1),
            "dropout 0.1 with context_parallel_size=2",
        ),
        (lambda: attention(TorchAttention, attn_mask_type=AttnMaskType.padding), "padding mask"),
    ):
        with pytest.raises(NotImplementedError, match=name):
            call()


@pytest.mark.parametrize("comm", ["p2p", "a2a"])
def test_ways_of_sharing_a_sequence_that_need_transformer_engine(
    comm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_from_hf(CONFIGS["gqa"].to_dict())
    assert obstacle_to_context_comm(comm, spec) == "it needs TransformerEngine, which is not here"
    assert obstacle_to_context_comm("all_gather", spec) == ""
    gathered = transformer_config(spec, context=2, context_comm="all_gather")
    assert gathered.cp_comm_type == "all_gather"
    monkeypatch.setattr(accelerators, "has_transformer_engine", lambda: True)
    assert obstacle_to_context_comm(comm, spec) == ""
    capped = replace(spec, attention_softcap=2.0)
    assert "without a cap on its scores" in obstacle_to_context_comm(comm, capped)


def test_building_warns_of_nothing() -> None:
    spec = spec_from_hf(CONFIGS["gqa"].to_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_model(spec, transformer_config(spec, pipeline=1))
