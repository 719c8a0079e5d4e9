"""No value of a config.json, whatever its type, ends in anything but a spec or one line."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec, spec_from_hf
from megatron_deft.models.families.values import SHOWN
from megatron_deft.models.rotary import inverse_frequencies
from tests.convert.tiny_models import CONFIGS, LLAMA3_SCALING, YARN_SCALING

WRONG: tuple[Any, ...] = (
    None, "x", "4", "", -1, 0, 1, 1.5, -0.5, True, False, [], [1], ["x"], [[]], [None], {},
    {"a": 1}, {"a": {}}, {"rope_type": []}, math.inf, -math.inf, math.nan, 10**400, -(10**400),
    "two\nlines", "x" * 1000,
)  # fmt: skip
# Read too where a config has them.
MORE = (
    "layer_types",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "transformers_weights",
)
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": LLAMA3_SCALING,
    "yarn": {
        **YARN_SCALING,
        "beta_slow": 1.0,
        "truncate": False,
        "attention_factor": 1.1,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
}


def written(case: str) -> dict[str, Any]:
    """config.json as save_pretrained writes it."""
    config: dict[str, Any] = json.loads(CONFIGS[case].to_json_string())
    return config


def without(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config with each key, and with some that it lacks, replaced or left out."""
    for key in {*config, *MORE}:
        yield {k: v for k, v in config.items() if k != key}
        yield from ({**config, key: value} for value in WRONG)


def read(config: dict[str, Any]) -> ModelSpec | None:
    """The spec, checked to be of numbers that can be written and read; None for a refusal."""
    try:
        spec = spec_from_hf(config)
    except UserError as error:
        said = str(error)
    else:
        text = json.dumps(spec.to_json(), allow_nan=False)
        assert ModelSpec.from_json(json.loads(text)) == spec
        return spec
    assert said.startswith("config.json: ")
    assert "\n" not in said
    assert len(said) < SHOWN + 250
    return None


@pytest.mark.parametrize("case", CONFIGS)
def test_any_value_of_any_key_is_read_or_refused(case: str) -> None:
    config = written(case)
    assert read(config) is not None
    found = [read(changed) for changed in without(config)]
    assert found.count(None) > len(config)


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", SCALINGS)
def test_any_rotary_parameter_is_read_or_refused(kind: str, place: str) -> None:
    rotary = ("rope_parameters", "rope_scaling", "rope_theta")
    config = {k: v for k, v in written("llama_gqa_tied").items() if k not in rotary}
    entry = {"rope_theta": 500.0, **SCALINGS[kind]}
    assert read({**config, place: entry}) is not None
    found = [read({**config, place: changed}) for changed in without(entry)]
    for spec in filter(None, found):
        assert inverse_frequencies(spec).isfinite().all()
    assert found.count(None) > len(entry)


@pytest.mark.parametrize(
    ("case", "key", "value", "says"),
    [
        ("llama_gqa_tied", "rms_norm_eps", None, "must be a positive number, at most 1, got None"),
        ("llama_gqa_tied", "rms_norm_eps", "x", "must be a positive number, at most 1, got 'x'"),
        ("llama_gqa_tied", "initializer_range", -1, "must be a number of at least 0, at most 1"),
        ("llama_gqa_tied", "tie_word_embeddings", 1, "must be true or false, got 1"),
        ("llama_gqa_tied", "num_hidden_layers", 10**9, "must be a positive integer, at most 10000"),
        ("llama_gqa_tied", "rope_scaling", "x", "must be an object, got 'x'"),
        ("llama_gqa_tied", "rope_scaling", {"type": "linear", "factor": "4"}, "factor must be a"),
        ("llama_gqa_tied", "rope_theta", 1, "must be above 1, got 1"),
        ("llama_gqa_tied", "architectures", 3, "must be a list of strings, got 3"),
        ("llama_gqa_tied", "hidden_act", [], r"\[\] is not supported: only silu"),
        ("llama_gqa_tied", "transformers_weights", "other.safetensors", "usual names"),
        ("qwen2_windows", "layer_types", 4, "must be a list of strings, got 4"),
        ("qwen2_windows", "sliding_window", "8", "must be a positive integer, got '8'"),
        ("qwen2_windows", "use_sliding_window", "no", "must be true or false, got 'no'"),
        ("mistral_window", "sliding_window", 0, "must be a positive integer, got 0"),
        ("gemma2", "query_pre_attn_scalar", 0, "must be a positive number, got 0"),
        ("gemma2", "final_logit_softcapping", True, "must be a positive number, got True"),
        ("qwen3_moe", "decoder_sparse_step", 0, "must be a positive integer, got 0"),
        ("qwen3_moe", "mlp_only_layers", 1, "must be a list of integers, got 1"),
        ("qwen3_moe", "mlp_only_layers", [True], r"must be a list of integers, got \[True\]"),
        ("qwen3_moe", "num_local_experts", [1], r"must be a positive integer, got \[1\]"),
        ("qwen3_moe", "num_experts_per_tok", 7, "is 7, there are 6 experts"),
        ("qwen3_moe", "num_experts_per_tok", 1, "1 with normalised expert weights is not supp"),
    ],
)
def test_the_key_is_named(case: str, key: str, value: Any, says: str) -> None:
    config = written(case)
    if key.startswith("rope_"):
        config.pop("rope_parameters", None)
    named = "" if "factor" in says else rf"{key} "
    with pytest.raises(UserError, match=rf"config\.json: {named}.*{says}"):
        spec_from_hf({**config, key: value})


def test_null_is_what_transformers_takes_for_absent() -> None:
    config = written("gemma2")
    spec = spec_from_hf({**config, "final_logit_softcapping": None, "layer_types": None})
    assert (spec.logits_softcap, spec.window_layers) == (None, (0, 2))
    assert spec_from_hf({**written("llama_mha_untied"), "num_key_value_heads": None}).head_dim == 8


def test_a_refused_scaling_is_named_without_its_factors() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    for case in ("phi3_partial", "llama_mha_untied"):
        config = {**written(case), "rope_scaling": {"type": "longrope", **factors}}
        with pytest.raises(UserError, match=r"rope_type 'longrope' is not supported") as error:
            spec_from_hf(config)
        assert "1.0" not in str(error.value)
