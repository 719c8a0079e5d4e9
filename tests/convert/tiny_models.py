"""Tiny transformers models of every shape that conversion must get right, with random weights."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
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

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_SCALING = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 8.0,
    "original_max_position_embeddings": 32,
}


def rotary(theta: float, scaling: dict[str, Any] | None = None, **partial: float) -> dict[str, Any]:
    """Rotary parameters as the config classes of this transformers take them."""
    if transformers.__version__.startswith("4."):
        return {"rope_theta": theta, "rope_scaling": scaling, **partial}
    kind = {"rope_type": "default"}
    return {"rope_parameters": {**kind, **(scaling or {}), "rope_theta": theta, **partial}}


CONFIGS: dict[str, PretrainedConfig] = {
    "llama_mha_untied": LlamaConfig(**COMMON, vocab_size=128, num_key_value_heads=4),
    "llama_gqa_tied": LlamaConfig(
        **COMMON, vocab_size=260, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "llama_biases_odd_vocab": LlamaConfig(
        **COMMON,
        vocab_size=1003,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
        **rotary(5000.0, LLAMA3_SCALING),
    ),
    "qwen2_biases": Qwen2Config(**COMMON, vocab_size=150, num_key_value_heads=2),
    "qwen2_mqa_tied": Qwen2Config(
        **COMMON, vocab_size=97, num_key_value_heads=1, tie_word_embeddings=True
    ),
    "mistral_wide_heads": MistralConfig(
        **COMMON, vocab_size=128, num_key_value_heads=2, head_dim=12, sliding_window=None
    ),
    "llama_yarn": LlamaConfig(
        **COMMON, vocab_size=128, num_key_value_heads=2, **rotary(700.0, YARN_SCALING)
    ),
    "mistral_window": MistralConfig(
        **COMMON, vocab_size=128, num_key_value_heads=2, sliding_window=8
    ),
    "qwen2_windows": Qwen2Config(
        **COMMON,
        vocab_size=128,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=3,
    ),
    "qwen3_tied": Qwen3Config(
        **COMMON, vocab_size=128, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON,
        vocab_size=128,
        num_key_value_heads=2,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    ),
    "qwen3_moe_mixed": Qwen3MoeConfig(
        **COMMON,
        vocab_size=128,
        num_key_value_heads=2,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=3,
        norm_topk_prob=False,
        mlp_only_layers=[1],
    ),
    "mixtral": MixtralConfig(
        **COMMON, vocab_size=128, num_key_value_heads=2, num_local_experts=4, sliding_window=None
    ),
    "gemma2": Gemma2Config(
        **COMMON,
        vocab_size=128,
        num_key_value_heads=2,
        head_dim=12,
        query_pre_attn_scalar=20,
        sliding_window=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        pad_token_id=None,
    ),
    "phi3_partial": Phi3Config(
        **COMMON,
        vocab_size=128,
        num_key_value_heads=2,
        **rotary(500.0, partial_rotary_factor=0.5),
        sliding_window=9,
        pad_token_id=None,
    ),
    "glm": GlmConfig(
        **COMMON, vocab_size=128, num_key_value_heads=2, head_dim=8, pad_token_id=None
    ),
    "glm4": Glm4Config(
        **COMMON, vocab_size=130, num_key_value_heads=1, head_dim=16, pad_token_id=None
    ),
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough for every one of them, biases and norms too, to move the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                parameter.add_(0.2 * noise)


def make(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32, **save: Any
) -> Path:
    """Save a random model of `config` in `folder`."""
    model = AutoModelForCausalLM.from_config(deepcopy(config))  # which saving writes into
    randomise(model)
    model.to(dtype).save_pretrained(folder, **save)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files."""
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_tensors(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """Equal names, shapes, dtypes and bits."""
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def logits(folder: Path, ids: Tensor) -> Tensor:
    """What transformers computes in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(ids).logits
