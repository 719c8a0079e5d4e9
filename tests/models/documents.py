"""Documents, tiny models of every kind in float64, and what each document's loss is."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import (
    Gemma2Config,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from megatron_deft.data.batches import Batch, collate
from megatron_deft.data.samples import IGNORE, Encoded
from megatron_deft.models.build import build_model, transformer_config
from megatron_deft.models.families import ModelSpec, spec_from_hf
from megatron_deft.models.packed import packed_seq_params

VOCAB = 96  # a multiple of VOCAB_PAD times any tensor size: no layout pads it
VOCAB_PAD = 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
NO_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(  # a softcap everywhere, a window in the first layer
        **{**SIZES, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0},
        query_pre_attn_scalar=8,
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "glm": GlmConfig(**SIZES, head_dim=8, **NO_TOKENS),  # half the dimensions turn, in pairs
    "phi3": Phi3Config(**SIZES, **NO_TOKENS),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
}
# Their norms compute in float32 whatever the model is in.
FLOAT32_INSIDE = ("gemma2",)

Losses = dict[tuple[int, int], float]  # by document and position in it
Gradients = dict[str, Tensor]


def tolerance(name: str) -> dict[str, float]:
    """Another order of additions, of numbers about 1 in float64, or in float32 in places."""
    return (
        {"rtol": 1e-5, "atol": 1e-5} if name in FLOAT32_INSIDE else {"rtol": 1e-12, "atol": 1e-13}
    )


def spec_of(name: str) -> ModelSpec:
    return spec_from_hf(FAMILIES[name].to_dict())


def build(name: str, dtype: torch.dtype = torch.float64, **layout: Any) -> GPTModel:
    """The family's model for this rank, in `dtype`, with biases and norms that are not trivial."""
    spec = spec_of(name)
    tcfg = transformer_config(spec, calculate_per_token_loss=True, **layout)
    tcfg.params_dtype = tcfg.pipeline_dtype = dtype
    if spec.expert_layers and dtype == torch.float64:
        tcfg.moe_router_dtype = "fp64"
    model = build_model(spec, tcfg, vocab_pad_multiple=VOCAB_PAD)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model.train()


def document(length: int, seed: int) -> Encoded:
    """A document of `length` positions; the weights of some tokens are 0."""
    generator = np.random.default_rng(seed)
    weights = generator.choice([0.0, 0.5, 1.0], length + 1, p=[0.2, 0.4, 0.4]).astype(np.float32)
    weights[1] = 1.0
    return Encoded(generator.integers(0, VOCAB, length + 1, np.int32), weights)


def documents(*lengths: int) -> list[Encoded]:
    return [document(length, seed) for seed, length in enumerate(lengths)]


def token_losses(model: GPTModel, batch: Batch, **changes: Any) -> Tensor:
    """-log p of each label [b, s], 0 where there is none; `changes` to the packed_seq_params."""
    packed = packed_seq_params(batch)
    for name, value in changes.items():
        setattr(packed, name, value)
    logits = model(batch["tokens"], batch["position_ids"], None, packed_seq_params=packed)
    return losses_of(logits, batch)


def losses_of(logits: Tensor, batch: Batch) -> Tensor:
    """From [b, s, vocabulary / tensor]."""
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    labels = batch["labels"]
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    ).view(labels.shape)


def by_place(losses: Tensor, batch: Batch) -> Losses:
    """The losses of trained tokens by document and position."""
    trained = batch["labels"] != IGNORE
    places = zip(batch["documents"][trained].tolist(), batch["position_ids"][trained].tolist(),
                 strict=True)  # fmt: skip
    return dict(zip(places, losses[trained].tolist(), strict=True))


def gradients(model: GPTModel) -> Gradients:
    """And none is left on the model."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def alone(model: GPTModel, samples: list[Encoded]) -> tuple[Losses, list[Gradients]]:
    """Each document in a dense batch of its own: losses, and gradients of their weighted sum."""
    losses: Losses = {}
    found = []
    for number, sample in enumerate(samples):
        batch = collate([[sample]], len(sample.tokens) - 1, packed=False)
        loss = token_losses(model, batch)
        losses |= {(number, t): value for (_, t), value in by_place(loss, batch).items()}
        (loss * batch["weights"]).sum().backward()
        found.append(gradients(model))
    return losses, found


def total(parts: list[Gradients]) -> Gradients:
    """The sum of documents' gradients; an expert that a document does not meet has none there."""
    names = {name for part in parts for name in part}
    return {name: torch.stack([p[name] for p in parts if name in p]).sum(0) for name in names}
