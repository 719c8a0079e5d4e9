"""The published settings for NeMo's recipes, by data set and model; imports nothing of NeMo.

Sources: the DEFT release (arXiv 2602.11424; all but Qwen3-4B) and EAFT's released script (arXiv
2601.02151; Qwen3-4B). examples/configs holds the same numbers for this package's own trainer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_deft.errors import UserError


@dataclass(frozen=True)
class Base:
    """Where NeMo has a model.

    hub:      name of the weights on the Hub, and of the checkpoint nemo://HUB
    recipe:   module of nemo.collections.llm.recipes; None where NeMo has none
    config:   what the weights have otherwise than NeMo's class for the recipe, or than
              LlamaConfig's defaults where there is no recipe
    """

    hub: str
    recipe: str | None
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How one model is trained on one data set. Lengths in tokens, batches in samples."""

    lr: float
    max_length: int
    micro_batch: int
    samples: int  # of one epoch, whole batches
    global_batch: int = 256
    min_lr: float = 0.0
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_grad: float = 1.0

    @property
    def steps(self) -> int:
        """Of one epoch."""
        return self.samples // self.global_batch

    @property
    def warmup_steps(self) -> int:
        """The first steps, in which the learning rate grows."""
        return int(self.warmup_ratio * self.steps)


# Weights of the Math models turn the positions with another base than the models they come from,
# and the small models have one matrix for embedding and output: NeMo's classes say neither.
_SHORT_ROPE = {"rotary_base": 10000.0}
_TIED = {"share_embeddings_and_output_weights": True}
MODELS: Mapping[str, Base] = {
    "Qwen2.5-Math-1.5B": Base("Qwen/Qwen2.5-Math-1.5B", "qwen25_1p5b", _SHORT_ROPE | _TIED),
    "Qwen2.5-Math-7B": Base("Qwen/Qwen2.5-Math-7B", "qwen25_7b", _SHORT_ROPE),
    "Qwen2.5-1.5B": Base("Qwen/Qwen2.5-1.5B", "qwen25_1p5b", _TIED),
    "Qwen2.5-7B": Base("Qwen/Qwen2.5-7B", "qwen25_7b"),
    "Llama-3.1-8B": Base("meta-llama/Llama-3.1-8B", "llama31_8b"),
    "Llama-3.2-3B": Base("meta-llama/Llama-3.2-3B", "llama32_3b"),
    "DeepSeek-Math-7B": Base(
        "deepseek-ai/deepseek-math-7b-base", None,
        {
            "num_layers": 30, "hidden_size": 4096, "ffn_hidden_size": 11008,
            "num_attention_heads": 32, "num_query_groups": 32, "vocab_size": 102400,
            "layernorm_epsilon": 1e-6, "rotary_base": 10000,
        },
    ),
    "Qwen3-4B": Base("Qwen/Qwen3-4B", "qwen3_4b"),
}  # fmt: skip
"""The models of the published tables."""

_MATH = Settings(lr=5e-5, max_length=3072, micro_batch=4, samples=264 * 256)
_MEDICAL = Settings(lr=5e-5, max_length=800, micro_batch=16, samples=91 * 256)
_FIGFONT = Settings(lr=5e-5, max_length=800, micro_batch=16, samples=156 * 256, weight_decay=1e-5)
_LLAMA_8B: dict[str, Any] = {"lr": 2e-5}
_EAFT: dict[str, Any] = {
    "lr": 1e-5, "min_lr": 1e-6, "warmup_ratio": 0.05, "max_length": 16384, "global_batch": 64,
    "micro_batch": 4,
}  # fmt: skip

SETTINGS: Mapping[str, Mapping[str, Settings]] = {
    "math": {
        "Qwen2.5-Math-1.5B": _MATH,
        "Qwen2.5-Math-7B": _MATH,
        "Llama-3.1-8B": replace(_MATH, **_LLAMA_8B),
        "DeepSeek-Math-7B": _MATH,
        "Qwen3-4B": replace(_MATH, **_EAFT),
    },
    "medical": {
        "Llama-3.2-3B": _MEDICAL,
        "Llama-3.1-8B": replace(_MEDICAL, **_LLAMA_8B),
        "Qwen2.5-1.5B": _MEDICAL,
        "Qwen2.5-Math-7B": _MEDICAL,
        "Qwen3-4B": replace(_MEDICAL, **_EAFT),
    },
    "figfont": {
        "Qwen2.5-7B": _FIGFONT,
        "Qwen2.5-1.5B": _FIGFONT,
        "Llama-3.1-8B": replace(_FIGFONT, **_LLAMA_8B),
        "Llama-3.2-3B": _FIGFONT,
    },
}
"""Data set -> model -> settings."""


def find_model(name: str) -> str:
    """The key of MODELS that `name` means: Hub names, case, dashes and dots do not matter.

    Errors: UserError for any other model.
    """
    names = {_plain(key): key for key in MODELS} | {_plain(b.hub): k for k, b in MODELS.items()}
    found = names.get(_plain(name))
    if found is None:
        raise UserError(
            f"model={name}: legal are {', '.join(MODELS)}; for another model pass its NeMo recipe"
        )
    return found


def find_settings(model: str, dataset: str) -> Settings:
    """The published settings of `model`, a key of MODELS.

    Errors: UserError for data sets and pairs that are not published.
    """
    if dataset not in SETTINGS:
        raise UserError(f"dataset={dataset}: legal are {', '.join(SETTINGS)}")
    found = SETTINGS[dataset].get(model)
    if found is None:
        legal = ", ".join(name for name, models in SETTINGS.items() if model in models)
        raise UserError(
            f"dataset={dataset}: nothing is published for it with {model}, which has: {legal}; "
            "for other settings pass a NeMo recipe and leave dataset out"
        )
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_.]", "", name.rsplit("/", 1)[-1].lower())
