"""What follows from a ModelSpec, and what it is read from again."""

import json
from dataclasses import replace
from typing import Any

import pytest

from megatron_deft.errors import UserError
from megatron_deft.models.families import spec_from_hf
from megatron_deft.models.families.modelspec import ModelSpec
from tests.models.test_families import LLAMA3_SCALING, LLAMA_31_8B, QWEN_25_1B


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (None, 32768),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 32768),
        ({"rope_type": "llama3", **LLAMA3_SCALING}, 32768),
        ({"rope_type": "linear", "factor": 4.0}, 32768),
    ],
)
def test_context_length(scaling: dict[str, Any] | None, context: int) -> None:
    raw = {**QWEN_25_1B, "max_position_embeddings": 32768, "rope_scaling": scaling}
    assert spec_from_hf(raw).context_length == context


def test_windows_of_every_layer() -> None:
    spec = replace(spec_from_hf(LLAMA_31_8B), num_layers=4, window=7, window_layers=(1, 3))
    assert spec.windows == (None, 7, None, 7)
    assert replace(spec, window=None, window_layers=()).windows == (None,) * 4


def test_json_round_trip() -> None:
    spec = spec_from_hf(LLAMA_31_8B)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    renamed = {"size" if key == "vocab_size" else key: v for key, v in spec.to_json().items()}
    with pytest.raises(UserError, match=r"missing fields \['vocab_size'\].*unknown fields \['size"):
        ModelSpec.from_json(renamed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", None), ("num_layers", "4"), ("hidden_size", 4096.5), ("head_dim", -1),
        ("tied_embeddings", 1), ("rope_scaling", "x"), ("rms_norm_eps", True), ("family", {}),
        ("rope_theta", float("inf")), ("window_layers", ["0"]), ("window_layers", 3),
    ],
)  # fmt: skip
def test_values_that_no_spec_has(name: str, value: object) -> None:
    damaged = spec_from_hf(LLAMA_31_8B).to_json() | {name: value}
    with pytest.raises(UserError, match=rf"model spec: {name} .* cannot be: the folder is damaged"):
        ModelSpec.from_json(damaged)
