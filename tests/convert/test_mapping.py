"""The tables name every tensor of real models on both sides; the transforms are exact inverses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_deft.convert import mapping
from megatron_deft.convert.verify import single_process
from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec, spec_from_hf
from tests.convert.tiny_models import CONFIGS, tensors

CASES = sorted(CONFIGS)


def spec_of(case: str) -> ModelSpec:
    config = CONFIGS[case]
    names = AutoModelForCausalLM.from_config(config).__class__.__name__
    return spec_from_hf({**config.to_dict(), "architectures": [names]})


@pytest.mark.parametrize("case", CASES)
def test_table_is_the_transformers_model(case: str, tmp_path: Path) -> None:
    """Names and shapes of every tensor that transformers saves, none missing, none left over."""
    spec = spec_of(case)
    AutoModelForCausalLM.from_config(CONFIGS[case]).save_pretrained(tmp_path)
    real = {name: tuple(tensor.shape) for name, tensor in tensors(tmp_path).items()}
    table = {name: shape for p in mapping.parameters(spec) for name, shape in p.hf.items()}
    assert table == real


@pytest.mark.parametrize("case", CASES)
def test_table_is_the_megatron_model(case: str) -> None:
    """Parameter names, checkpoint keys and global shapes are those of the GPTModel."""
    spec = spec_of(case)
    with single_process():
        from megatron.core.dist_checkpointing.mapping import (
            ShardedTensor,
            apply_factories,
        )

        from megatron_deft.models.build import build_model, transformer_config

        model = build_model(spec, transformer_config(spec), vocab_pad_multiple=1)
        names = {name: tuple(p.shape) for name, p in model.named_parameters()}
        sharded = model.sharded_state_dict()
        apply_factories(sharded)
        pieces = [piece for v in sharded.values() for piece in (v if isinstance(v, list) else [v])]
        keys = {p.key: tuple(p.global_shape) for p in pieces if isinstance(p, ShardedTensor)}
    parameters = mapping.parameters(spec)
    assert {p.megatron: mapping.megatron_shape(p, spec) for p in parameters} == names
    slots = [mapping.slots(p, spec)[0] for p in parameters]
    assert {slot.key: slot.size for slot in slots} == keys


def test_qkv_is_interleaved_by_query_group() -> None:
    """4 heads in 2 groups of head_dim 2: q1 q2 k1 v1 | q3 q4 k2 v2, as megatron splits it."""
    spec = replace(spec_of("llama_gqa_tied"), head_dim=2)
    q = torch.arange(8.0)
    k, v = 100 + torch.arange(4.0), 200 + torch.arange(4.0)
    parameter = next(p for p in mapping.parameters(spec) if p.transform == "qkv")
    mixed = mapping.join(parameter, [q, k, v], spec)
    assert mixed.tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


@pytest.mark.parametrize("case", CASES)
def test_split_undoes_join_to_the_last_bit(case: str) -> None:
    spec = spec_of(case)
    for parameter in mapping.parameters(spec)[:20]:
        parts = [torch.randn(shape).bfloat16() for shape in parameter.hf.values()]
        joined = mapping.join(parameter, parts, spec)
        assert tuple(joined.shape) == mapping.megatron_shape(parameter, spec)
        again = mapping.split(parameter, joined, spec)
        assert list(again) == list(parameter.hf)
        for part, back in zip(parts, again.values(), strict=True):
            assert torch.equal(part, back)
            assert back.is_contiguous()


def test_layers_of_a_checkpoint_are_stacked_or_spelled() -> None:
    spec = spec_of("llama_mha_untied")
    norm = next(
        p for p in mapping.parameters(spec) if p.megatron.endswith("3.input_layernorm.weight")
    )
    assert mapping.slots(norm, spec) == (
        mapping.Slot(
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight", (4, 32), (3, 0), (1, 32)
        ),
        mapping.Slot(
            "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", (32,), (0,), (32,)
        ),
    )


def test_unknown_family_is_named() -> None:
    with pytest.raises(
        UserError, match="'gpt2' has no conversion table: legal are gemma2, glm, glm4, llama"
    ):
        mapping.parameters(replace(spec_of("llama_mha_untied"), family="gpt2"))
