"""Real Hugging Face configs against the specs read from them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    Gemma2Config,
    Glm4Config,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec, spec_from_hf

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# config.json of meta-llama/Llama-3.1-8B and Qwen/Qwen2.5-1.5B, as transformers 4 wrote them
LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {**LLAMA3_SCALING, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN_25_1B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_llama_31() -> None:
    assert spec_from_hf(LLAMA_31_8B) == ModelSpec(
        family="llama",
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={"rope_type": "llama3", **LLAMA3_SCALING},
        tied_embeddings=False,
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        initializer_range=0.02,
    )


def test_qwen_25() -> None:
    spec = spec_from_hf(QWEN_25_1B)
    assert (spec.qkv_bias, spec.attention_out_bias, spec.mlp_bias) == (True, False, False)
    assert (spec.num_query_groups, spec.head_dim, spec.tied_embeddings) == (2, 128, True)
    assert (spec.rope_theta, spec.rope_scaling) == (1e6, None)


@pytest.mark.parametrize(
    ("config_class", "raw"), [(LlamaConfig, LLAMA_31_8B), (Qwen2Config, QWEN_25_1B)]
)
def test_what_transformers_makes_of_it_is_the_same_model(
    config_class: type[PretrainedConfig], raw: dict[str, Any]
) -> None:
    """The installed transformers writes its own spelling and every default."""
    assert spec_from_hf(config_class(**raw).to_dict()) == spec_from_hf(raw)


@pytest.mark.parametrize(
    "config_class",
    [
        Gemma2Config,
        Glm4Config,
        GlmConfig,
        LlamaConfig,
        MistralConfig,
        MixtralConfig,
        Phi3Config,
        Qwen2Config,
        Qwen3Config,
        Qwen3MoeConfig,
    ],
)
def test_absent_keys_mean_what_they_mean_to_transformers(
    config_class: Callable[..., PretrainedConfig],
) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 256,
        "num_attention_heads": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 300,
        "vocab_size": 1000,
    }
    if config_class is not Gemma2Config:  # which has a window always
        sizes["sliding_window"] = None
    whole = config_class(**sizes).to_dict()
    bare = {**sizes, "model_type": whole["model_type"]}
    assert spec_from_hf(bare) == spec_from_hf(whole)


def test_both_spellings_of_rope() -> None:
    bare = {k: v for k, v in LLAMA_31_8B.items() if k not in ("rope_theta", "rope_scaling")}
    scaling = {**LLAMA3_SCALING, "rope_type": "llama3"}
    parameters = {**scaling, "rope_theta": 500000.0}
    old = {**bare, "rope_theta": 500000, "rope_scaling": {**LLAMA3_SCALING, "type": "llama3"}}
    spellings = [
        old,
        {**bare, "rope_parameters": parameters},
        {**old, "rope_parameters": parameters},
    ]
    assert [spec_from_hf(config) for config in spellings] == [spec_from_hf(LLAMA_31_8B)] * 3


def test_biases_of_llama() -> None:
    spec = spec_from_hf({**LLAMA_31_8B, "attention_bias": True})
    assert (spec.qkv_bias, spec.attention_out_bias, spec.mlp_bias) == (True, True, False)
    spec = spec_from_hf({**LLAMA_31_8B, "mlp_bias": True})
    assert (spec.qkv_bias, spec.attention_out_bias, spec.mlp_bias) == (False, False, True)


def mistral(**changes: Any) -> dict[str, Any]:
    return {**MistralConfig(sliding_window=None).to_dict(), **changes}


def phi3(**changes: Any) -> dict[str, Any]:
    return {**Phi3Config().to_dict(), **changes}


def test_windows() -> None:
    spec = spec_from_hf(mistral(sliding_window=4096))
    assert (spec.window, spec.window_layers) == (4096, tuple(range(32)))
    absent = {k: v for k, v in mistral().items() if k != "sliding_window"}
    assert spec_from_hf(absent) == spec
    spec = spec_from_hf({**QWEN_25_1B, "use_sliding_window": True, "max_window_layers": 26})
    assert (spec.window, spec.window_layers) == (131072, (26, 27))
    spec = spec_from_hf(Gemma2Config(num_hidden_layers=4).to_dict())
    assert (spec.window, spec.window_layers) == (4096, (0, 2))
    assert spec_from_hf(QWEN_25_1B).window is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not one of gemma2, glm, glm4, llama, mistral, "),
        ({}, "model_type 'None'"),
        ({**LLAMA_31_8B, "hidden_act": "gelu"}, "hidden_act 'gelu' .* silu"),
        ({**LLAMA_31_8B, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({**LLAMA_31_8B, "quantization_config": {"bits": 4}}, "quantization_config"),
        ({**LLAMA_31_8B, "architectures": ["LlamaForTokenClassification"]}, "LlamaForCausalLM"),
        ({**LLAMA_31_8B, "rope_scaling": {"rope_type": "dynamic"}}, "rope_type 'dynamic'"),
        ({**LLAMA_31_8B, "rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({**LLAMA_31_8B, "layer_types": ["sliding_attention"] * 32}, "layer_types"),
        ({**LLAMA_31_8B, "rope_scaling": {"rope_type": "llama3"}}, "lacks .*'factor'"),
        ({**LLAMA_31_8B, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta is given as"),
        (
            {**LLAMA_31_8B, "rope_parameters": {"rope_theta": 500000.0}},
            "rope_scaling and rope_parameters differ",
        ),
        (
            {**QWEN_25_1B, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "per layer type",
        ),
        ({**LLAMA_31_8B, "num_key_value_heads": 5}, "32 heads do not divide by 5 groups"),
        ({**LLAMA_31_8B, "num_attention_heads": 33}, "not a multiple of 33 heads"),
        ({**LLAMA_31_8B, "vocab_size": None}, "vocab_size must be a positive integer, got None"),
        ({**QWEN_25_1B, "layer_types": ["sliding_attention"] * 28}, "layer_types"),
        ({**QWEN_25_1B, "layer_types": ["full_attention"] * 27}, "layer_types .* of 27 layers"),
        (mistral(layer_types=["full_attention"]), "layer_types"),
        (phi3(rope_scaling={"rope_type": "yarn"}), "rope_scaling .* of rope_type default"),
        (phi3(rope_parameters={"rope_type": "longrope"}), "rope_parameters .* default"),
        (phi3(embd_pdrop=0.1), "embd_pdrop 0.1"),
        ({**Gemma2Config().to_dict(), "hidden_activation": "relu"}, "hidden_activation 'relu'"),
        ({**Gemma2Config(use_bidirectional_attention=True).to_dict()}, "use_bidirectional"),
        ({**MixtralConfig(router_jitter_noise=0.1).to_dict()}, "router_jitter_noise 0.1"),
        ({**Qwen3MoeConfig(use_sliding_window=True).to_dict()}, "use_sliding_window True"),
        (
            {
                **Glm4Config().to_dict(),
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                },
            },
            "yarn with partial_rotary_factor",
        ),
    ],
)
def test_what_is_not_exact_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        spec_from_hf(config)
    assert "\n" not in str(error.value)


def test_reading_a_config_needs_no_torch() -> None:
    code = "import sys, megatron_deft.models.families; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
