"""config.json and tokenizer_config.json in a spelling that transformers 4.57 and 5 read alike.

What differs was found by writing the config of every family with both. transformers 4 reads over
keys that it does not know: what only 5 wrote, a rotary base of 5 million say, it takes for absent.

`transformers_version` stays what the base's says. Both versions read it with one intent, to tell
whether a Mistral tokenizer's file is from before or after its repair, and that file is copied.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_deft.convert.hf_folder import read_json, write_json
from megatron_deft.models.families import FAMILIES, ModelSpec


def _scaling(spec: ModelSpec) -> dict[str, Any]:
    return {key: value for key, value in (spec.rope_scaling or {}).items() if value is not None}


def _rotated_part(spec: ModelSpec) -> float | None:
    # written for 1 too where the family has it: GLM's class takes an absent one for a half
    reads_it = "rotary_fraction" in FAMILIES[spec.family].fields
    return spec.rotary_fraction if reads_it else None


def _rope_parameters(spec: ModelSpec) -> dict[str, Any]:
    rotary = {"rope_theta": spec.rope_theta, "partial_rotary_factor": _rotated_part(spec)}
    written = {key: value for key, value in rotary.items() if value is not None}
    return {"rope_type": "default", **_scaling(spec), **written}


# Key -> its value; a key whose value is None is not written.
SPELLINGS: Mapping[str, Callable[[ModelSpec], Any]] = {
    "rope_theta": lambda spec: spec.rope_theta,  # read by 4
    "rope_scaling": lambda spec: _scaling(spec) or None,  # by 4
    "partial_rotary_factor": _rotated_part,  # by 4
    "rope_parameters": _rope_parameters,  # by 5
    "num_experts": lambda spec: spec.experts or None,  # by 4 for Qwen3-MoE, by vLLM
    "num_local_experts": lambda spec: spec.experts or None,  # by 5, by both for Mixtral
    "architectures": lambda spec: [FAMILIES[spec.family].architecture],  # vLLM chooses by it
    # What 4 leaves out or writes as null, where a reader would have to know the class's default.
    "head_dim": lambda spec: spec.head_dim,
    "tie_word_embeddings": lambda spec: spec.tied_embeddings,
}
# Files of code that are not copied: the classes are transformers' own.
LEFT_OUT = ("auto_map",)
DTYPE_KEYS = ("dtype", "torch_dtype")  # of 5 and late 4, of earlier 4


def portable_config(
    config: Mapping[str, Any], spec: ModelSpec, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """`config` with every key of SPELLINGS and DTYPE_KEYS, without LEFT_OUT, sorted as transformers
    sorts.

    dtype: of all tensors; None: what the config says, if anything.
    """
    said = next((config[key] for key in DTYPE_KEYS if config.get(key) is not None), None)
    named = said if dtype is None else str(dtype).removeprefix("torch.")
    written = {key: value(spec) for key, value in SPELLINGS.items()}
    written |= dict.fromkeys(DTYPE_KEYS, named)
    kept = {k: v for k, v in config.items() if k not in written and k not in LEFT_OUT}
    return dict(sorted({**kept, **{k: v for k, v in written.items() if v is not None}}.items()))


def only_5_reads(config: Mapping[str, Any]) -> bool:
    """Whether `config` has its rotary parameters where transformers 4 does not look."""
    return "rope_parameters" in config and "rope_theta" not in config


# tokenizer_config.json: a key and the type its value has in 5 -> the key that 4 knows it by.
TOKENIZER_KEYS = (
    ("extra_special_tokens", list, "additional_special_tokens"),  # 4 wants a dict under this name
    ("model_specific_special_tokens", dict, "extra_special_tokens"),
)
TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # 5 knows both names


def portable_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json of transformers 5 in the spelling that 4 reads as well."""
    config = dict(config)
    name = config.get("tokenizer_class")
    if isinstance(name, str):
        config["tokenizer_class"] = TOKENIZER_CLASSES.get(name, name)
    for key, kind, older in TOKENIZER_KEYS:
        if isinstance(config.get(key), kind):
            config[older] = _both(config.pop(key), config.get(older))
    return config


def _both(value: Any, older: Any) -> Any:
    """Two lists or two objects in one, without doubles: each version alone reads one of them."""
    if isinstance(value, dict) and isinstance(older, dict):
        return {**older, **value}
    more = older if isinstance(value, list) and isinstance(older, list) else []
    return value + [item for item in more if item not in value] if more else value


def rewrite_tokenizer_config(folder: Path) -> None:
    """Bring the folder's tokenizer_config.json, if it has one, into the portable spelling."""
    path = folder / "tokenizer_config.json"
    if path.exists():
        write_json(path, portable_tokenizer_config(read_json(path, "tokenizer's config")))
