"""The published settings, by recipe, data set and model, under the names of the releases.

`one_click` makes scripts of them, and `integrations.nemo` recipes of NeMo.

Sources: arXiv 2602.11424 and 2510.00526 with their releases (deft), 2508.05629 and its release
(dft), 2601.02151 and its script for ms-swift (eaft: its data are not published, so the recipe
trains on ours; the settings of the paper's single domains are not published either).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Keys = Mapping[str, Any]  # dotted names of the configuration and their values

MODELS: Mapping[str, str] = {
    "qwen-2.5-math-1.5b": "Qwen/Qwen2.5-Math-1.5B",
    "qwen-2.5-math-7b": "Qwen/Qwen2.5-Math-7B",
    "qwen-2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen-2.5-7b": "Qwen/Qwen2.5-7B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "deepseek-math-7b": "deepseek-ai/deepseek-math-7b-base",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-4b": "Qwen/Qwen3-4B",
}
"""Released key -> name on the Hub."""


@dataclass(frozen=True)
class Model:
    """One model of a recipe: the keys it adds, and the prompt its answers are asked with."""

    keys: Keys
    prompt_type: str


@dataclass(frozen=True)
class Recipe:
    """One published way to train on one data set.

    folder:  of the data, below data/
    keys:    of the configuration, for all models
    prepare: arguments of `megatron-deft prepare`, after the data set and the folder
    splits:  the files that are trained and validated on
    tests:   files of the evaluation's test sets, below data/test/; none where the data set has a
             test split of its own
    """

    objective: str
    folder: str
    keys: Keys
    models: Mapping[str, Model]
    prepare: tuple[str, ...] = ()
    splits: tuple[str, str] = ("train", "val")
    tests: tuple[str, ...] = ()


SOURCES: Mapping[str, str] = {
    "deft": "Settings of the DEFT release (arXiv 2602.11424, 2510.00526).",
    "dft": "Settings of the DFT release (arXiv 2508.05629).",
    "eaft": "Settings of EAFT's released script (arXiv 2601.02151); its data are not published.",
}


def _model(lr: float, prompt_type: str, **data: Any) -> Model:
    return Model({"optim.lr": lr, **{f"data.{k}": v for k, v in data.items()}}, prompt_type)


def _written(lr: float, family: str, response: str) -> Model:
    """A model that is trained on prompts written out; the columns keep the spelling "reponse"."""
    prompt = f"{family}_prompt"
    return _model(
        lr, prompt, prompt_dict_keys=[prompt], response_dict_keys=[response],
        use_original_prompt=True,
    )  # fmt: skip


_COMMON: Keys = {
    "data.format": "columns", "data.prompt_key": "extra_info", "data.response_key": "extra_info",
    "data.val_max_samples": 128, "optim.schedule": "cosine", "optim.warmup_ratio": 0.1,
    "optim.betas": [0.9, 0.95], "optim.weight_decay": 0.01, "optim.clip_grad": 1.0,
    "train.global_batch": 256, "train.epochs": 1,
}  # fmt: skip
_MATH: Keys = {
    **_COMMON, "data.prompt_dict_keys": ["question"], "data.response_dict_keys": ["answer"],
    "data.use_original_prompt": False, "train.micro_batch": 4,
}  # fmt: skip
_SHORT: Keys = {**_COMMON, "data.max_length": 800, "train.micro_batch": 16}
_EAFT: Keys = {
    "data.max_length": 16384, "optim.min_lr": 1e-6, "optim.warmup_ratio": 0.05,
    "train.global_batch": 64, "train.micro_batch": 4, "train.save_every": 100,
}  # fmt: skip

_MATH_TESTS = (
    "minerva_math.jsonl", "olympiadbench.jsonl", "aime24.jsonl", "amc23.jsonl", "math_oai.jsonl"
)  # fmt: skip
_EAFT_MODELS = ("qwen3-0.6b", "qwen3-4b")  # of the script, and of the paper's tables
_NO_THINKING = "{}_reponse_no_thinking"

RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "deft": {
        "math": Recipe(
            "deft", "math", {**_MATH, "data.max_length": 3072, "train.save_every": 264},
            {
                "qwen-2.5-math-1.5b": _model(5e-5, "qwen-boxed"),
                "qwen-2.5-math-7b": _model(5e-5, "qwen-boxed"),
                # these two come without a chat template
                "llama-3.1-8b": _model(2e-5, "llama-base-boxed-with-bos", template="llama3"),
                "deepseek-math-7b": _model(5e-5, "deepseek-math", template="deepseek"),
            },
            tests=_MATH_TESTS,
        ),
        "medical": Recipe(
            "deft", "medical", _SHORT,
            {
                "llama-3.2-3b": _written(5e-5, "llama", _NO_THINKING.format("llama")),
                "llama-3.1-8b": _written(2e-5, "llama", _NO_THINKING.format("llama")),
                "qwen-2.5-1.5b": _written(5e-5, "qwen", _NO_THINKING.format("qwen")),
                "qwen-2.5-math-7b": _written(5e-5, "qwen", _NO_THINKING.format("qwen")),
            },
            tests=("medical.json",),
        ),
        "figfont": Recipe(
            "deft", "figfont", {**_SHORT, "optim.weight_decay": 1e-5},
            {
                "qwen-2.5-7b": _written(5e-5, "qwen", "answer"),
                "qwen-2.5-1.5b": _written(5e-5, "qwen", "answer"),
                "llama-3.1-8b": _written(2e-5, "llama", "answer"),
                "llama-3.2-3b": _written(5e-5, "llama", "answer"),
            },
            splits=("train", "test"),
        ),
    },
    "dft": {
        "math": Recipe(
            "dft", "math-100k",
            {**_MATH, "data.max_length": 2048, "train.save_every": 50, "train.val_every": 10},
            {
                "qwen-2.5-math-1.5b": _model(5e-5, "qwen-boxed"),
                "qwen-2.5-math-7b": _model(5e-5, "qwen-boxed"),
                "llama-3.1-8b": _model(2e-5, "llama-base-boxed", template="llama3"),
                "deepseek-math-7b": _model(5e-5, "deepseek-math", template="deepseek"),
            },
            prepare=("--source", "AI-MO/NuminaMath-CoT", "--limit", "100000"),
            tests=("math_oai.jsonl", "minerva_math.jsonl", "olympiadbench.jsonl"),
        ),
    },
    "eaft": {
        "math": Recipe(
            "eaft", "math", {**_MATH, **_EAFT},
            {key: _model(1e-5, "qwen-boxed") for key in _EAFT_MODELS},
            tests=_MATH_TESTS,
        ),
        "medical": Recipe(
            "eaft", "medical", {**_SHORT, **_EAFT},
            {key: _written(1e-5, "qwen", _NO_THINKING.format("qwen")) for key in _EAFT_MODELS},
            tests=("medical.json",),
        ),
    },
}  # fmt: skip
"""Recipe -> data set -> settings."""
