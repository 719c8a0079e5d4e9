"""What an export says in its JSON files, and that it is laid out as transformers and vLLM read it.

The proof that 4.57 and 5 read it alike is tests/transformers4.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from megatron_deft.convert.hf import export_hf, import_hf
from megatron_deft.convert.hf_folder import INDEX, SINGLE
from megatron_deft.convert.portable import (
    SPELLINGS,
    only_5_reads,
    portable_config,
    portable_tokenizer_config,
)
from megatron_deft.models.families import FAMILIES, spec_from_hf
from tests.convert.tiny_models import CONFIGS, make, tensors

ALWAYS = {"architectures", "head_dim", "rope_parameters", "rope_theta", "tie_word_embeddings"}


def written(case: str) -> dict[str, Any]:
    """config.json as save_pretrained writes it."""
    config: dict[str, Any] = json.loads(CONFIGS[case].to_json_string())
    return config


@pytest.mark.parametrize("case", CONFIGS)
def test_nothing_is_changed_by_spelling_it_out(case: str) -> None:
    config = written(case)
    spec = spec_from_hf(config)
    portable = portable_config(config, spec, torch.bfloat16)
    assert spec_from_hf(portable) == spec
    assert portable_config(portable, spec) == portable
    kept = config.keys() - SPELLINGS.keys() - {"dtype", "torch_dtype"}
    assert {key: portable[key] for key in kept} == {key: config[key] for key in kept}
    assert list(portable) == sorted(portable)
    assert portable.keys() >= ALWAYS
    assert None not in (portable[key] for key in SPELLINGS.keys() & portable.keys())
    assert not only_5_reads(portable)
    read = AutoConfig.for_model(**portable).to_dict()
    assert spec_from_hf(read) == spec


@pytest.mark.parametrize(
    ("case", "without", "expected"),
    [
        ("qwen3_moe", "num_experts", {"num_experts": 6, "num_local_experts": 6}),
        ("qwen3_moe", "num_local_experts", {"num_experts": 6, "num_local_experts": 6}),
        ("mixtral", "rope_theta", {"num_local_experts": 4, "rope_theta": 1e6}),
        ("phi3_partial", "", {"partial_rotary_factor": 0.5, "rope_theta": 500.0}),
        ("glm", "partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("glm4", "architectures", {"architectures": ["Glm4ForCausalLM"]}),
        ("gemma2", "tie_word_embeddings", {"tie_word_embeddings": True, "head_dim": 12}),
        ("mistral_window", "head_dim", {"head_dim": 8, "sliding_window": 8}),
        ("qwen2_windows", "head_dim", {"head_dim": 8, "max_window_layers": 3}),
    ],
)
def test_what_a_folder_leaves_to_the_reader_is_written(
    case: str, without: str, expected: dict[str, Any]
) -> None:
    config = written(case)
    if without.startswith("num_"):
        other = ({"num_experts", "num_local_experts"} - {without}).pop()
        config[other] = 6
    config.pop(without, None)
    portable = portable_config(config, spec_from_hf(config))
    assert {key: portable[key] for key in expected} == expected


def test_glm_that_rotates_whole_heads_says_so() -> None:
    """Its class takes an absent factor for a half."""
    config = {**written("glm"), "partial_rotary_factor": 1.0}
    config.pop("rope_parameters", None)
    portable = portable_config(config, spec_from_hf(config))
    assert portable["partial_rotary_factor"] == 1
    assert portable["rope_parameters"]["partial_rotary_factor"] == 1


def test_scaling_names_the_length_it_started_from() -> None:
    """For an absent one transformers 5 takes max_position_embeddings, 4 fails for llama3."""
    config = {
        **written("llama_yarn"),
        "rope_theta": 700.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0},
    }
    config.pop("rope_parameters", None)
    portable = portable_config(config, spec_from_hf(config))
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": True,
    }
    assert portable["rope_scaling"] == scaling
    assert portable["rope_parameters"] == {**scaling, "rope_theta": 700.0}


def test_mixed_dtypes_are_left_as_the_config_says() -> None:
    config = {**written("llama_gqa_tied"), "torch_dtype": "float16"}
    config.pop("dtype", None)
    portable = portable_config(config, spec_from_hf(config))
    assert portable["dtype"] == portable["torch_dtype"] == "float16"
    del config["torch_dtype"]
    assert not {"dtype", "torch_dtype"} & portable_config(config, spec_from_hf(config)).keys()


@pytest.mark.parametrize("case", sorted({c.model_type: n for n, c in CONFIGS.items()}.values()))
def test_no_export_points_to_code_that_it_has_not(case: str) -> None:
    code = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    config = {**written(case), "auto_map": code}
    portable = portable_config(config, spec_from_hf(config))
    assert "auto_map" not in portable
    assert portable == portable_config(written(case), spec_from_hf(config))


def test_an_export_loads_where_remote_code_is_trusted(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", CONFIGS["phi3_partial"])
    config = json.loads((source / "config.json").read_text())
    code = {"AutoConfig": "configuration_phi3.Phi3Config"}
    (source / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    weights = import_hf(source, tmp_path / "weights", verify=False)
    out = export_hf(weights, tmp_path / "out", verify=False)
    assert AutoConfig.from_pretrained(out, trust_remote_code=True).model_type == "phi3"


@pytest.mark.parametrize(
    ("config", "portable"),
    [
        ({"extra_special_tokens": ["<x>"], "a": 1}, {"additional_special_tokens": ["<x>"], "a": 1}),
        (
            {"extra_special_tokens": ["<x>", "<y>"], "additional_special_tokens": ["<z>", "<x>"]},
            {"additional_special_tokens": ["<x>", "<y>", "<z>"]},
        ),
        (
            {"extra_special_tokens": [{"content": "<x>"}], "additional_special_tokens": None},
            {"additional_special_tokens": [{"content": "<x>"}]},
        ),
        ({"additional_special_tokens": ["<z>"]}, {"additional_special_tokens": ["<z>"]}),
        (
            {"model_specific_special_tokens": {"a": 1}, "extra_special_tokens": {"a": 0, "b": 2}},
            {"extra_special_tokens": {"a": 1, "b": 2}},
        ),
        (
            {"model_specific_special_tokens": {"a": 1}, "extra_special_tokens": ["<x>"]},
            {"extra_special_tokens": {"a": 1}, "additional_special_tokens": ["<x>"]},
        ),
        ({"tokenizer_class": ["x"]}, {"tokenizer_class": ["x"]}),
    ],
)
def test_special_tokens_are_spelled_for_transformers_4(
    config: dict[str, Any], portable: dict[str, Any]
) -> None:
    assert portable_tokenizer_config(config) == portable


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("case", ["llama_gqa_tied", "qwen2_biases", "qwen3_moe", "mixtral"])
def test_layout_that_vllm_reads(case: str, shard_bytes: int, tmp_path: Path) -> None:
    """Its class by `architectures`, files by index or the single name, experts one by one."""
    source = make(tmp_path / "hf", CONFIGS[case])
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    weights = import_hf(source, tmp_path / "weights", verify=False)
    folder = export_hf(weights, tmp_path / "out", verify=False, shard_bytes=shard_bytes)

    said = json.loads((folder / "config.json").read_text())
    assert said["architectures"] == [FAMILIES[said["model_type"]].architecture]
    stored = tensors(folder)
    assert stored.keys() == tensors(source).keys()
    assert ("lm_head.weight" in stored) is not said["tie_word_embeddings"]
    experts = {found[1] for name in stored if (found := re.search(r"\.experts\.(\d+)\.", name))}
    assert len(experts) == said.get("num_experts", 0)
    files = {path.name for path in folder.glob("*.safetensors")}
    if shard_bytes == 10**9:
        assert files == {SINGLE}
        assert not (folder / INDEX).exists()
    else:
        index = json.loads((folder / INDEX).read_text())
        assert len(files) > 2
        assert set(index["weight_map"].values()) == files
        assert index["weight_map"].keys() == stored.keys()
