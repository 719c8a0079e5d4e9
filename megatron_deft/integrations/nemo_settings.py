"""The published settings as NeMo's recipes need them, by data set and model; imports no NeMo.

The numbers are those of `megatron_deft.published`; what is added is where NeMo has the models, and
how long an epoch of the published data is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.published import MODELS as HUB
from megatron_deft.published import RECIPES, Recipe


@dataclass(frozen=True)
class Base:
    """Where NeMo has a model.

    recipe:   module of nemo.collections.llm.recipes; None where NeMo has none
    config:   what the weights have otherwise than NeMo's class for the recipe, or than
              LlamaConfig's defaults where there is no recipe
    """

    recipe: str | None
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How one model is trained on one data set. Lengths in tokens, batches in samples.

    steps: of one epoch of the published data
    warmup_steps: the first of them, in which the learning rate grows
    """

    lr: float
    min_lr: float
    betas: tuple[float, float]
    weight_decay: float
    clip_grad: float
    max_length: int
    micro_batch: int
    global_batch: int
    steps: int
    warmup_steps: int


# Weights of the Math models turn the positions with another base than the models they come from,
# and the small models have one matrix for embedding and output: NeMo's classes say neither.
_SHORT_ROPE = {"rotary_base": 10000.0}
_TIED = {"share_embeddings_and_output_weights": True}
MODELS: Mapping[str, Base] = {
    "qwen-2.5-math-1.5b": Base("qwen25_1p5b", _SHORT_ROPE | _TIED),
    "qwen-2.5-math-7b": Base("qwen25_7b", _SHORT_ROPE),
    "qwen-2.5-1.5b": Base("qwen25_1p5b", _TIED),
    "qwen-2.5-7b": Base("qwen25_7b"),
    "llama-3.1-8b": Base("llama31_8b"),
    "llama-3.2-3b": Base("llama32_3b"),
    "deepseek-math-7b": Base(
        None,
        {
            "num_layers": 30, "hidden_size": 4096, "ffn_hidden_size": 11008,
            "num_attention_heads": 32, "num_query_groups": 32, "vocab_size": 102400,
            "layernorm_epsilon": 1e-6, "rotary_base": 10000,
        },
    ),
    "qwen3-4b": Base("qwen3_4b"),
}  # fmt: skip
"""The models of the published tables, by their released keys."""

DATASET_KWARGS: Mapping[str, Any] = {
    "prompt_template": "{input}{output}",
    "truncation_field": "output",  # what is too long loses the end of its answer
    "add_eos": False,  # the answer has its end of turn already
}
"""How NeMo's GPTSFTDataset reads what `megatron-deft prepare nemo` has written."""

_RELEASES = ("deft", "eaft")  # whose settings are taken; the first that has a model comes first
_SAMPLES = {"math": 264 * 256, "medical": 91 * 256, "figfont": 156 * 256}  # of an epoch, by DEFT


def _settings(dataset: str, recipe: Recipe, model: str) -> Settings:
    keys = {**recipe.keys, **recipe.models[model].keys}
    batch = keys["train.global_batch"]
    steps = _SAMPLES[dataset] // batch
    return Settings(
        lr=keys["optim.lr"],
        min_lr=keys.get("optim.min_lr", 0.0),
        betas=tuple(keys["optim.betas"]),
        weight_decay=keys["optim.weight_decay"],
        clip_grad=keys["optim.clip_grad"],
        max_length=keys["data.max_length"],
        micro_batch=keys["train.micro_batch"],
        global_batch=batch,
        steps=steps,
        warmup_steps=int(keys["optim.warmup_ratio"] * steps),
    )


SETTINGS: Mapping[str, Mapping[str, Settings]] = {
    dataset: {
        model: _settings(dataset, RECIPES[release][dataset], model)
        for release in reversed(_RELEASES)
        if dataset in RECIPES[release]
        for model in RECIPES[release][dataset].models
        if model in MODELS
    }
    for dataset in _SAMPLES
}
"""Data set -> model -> settings."""


def find_model(name: str) -> str:
    """The key of MODELS that `name` means: Hub names, case, dashes and dots do not matter.

    Errors: UserError for any other model.
    """
    names = {_plain(key): key for key in MODELS} | {_plain(HUB[key]): key for key in MODELS}
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
