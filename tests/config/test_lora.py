"""The keys of adapters, ours and the released trainers'."""

import pytest

from megatron_deft.config import LoraConfig, ParallelConfig, RunConfig, load_config
from megatron_deft.errors import UserError
from megatron_deft.models.families import spec_from_hf

ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@pytest.mark.parametrize(
    ("names", "targets"),
    [
        ("all-linear", ALL),
        ("[linear_fc2, linear_qkv]", ("linear_qkv", "linear_fc2")),
        ("[q_proj, o_proj, v_proj, k_proj]", ("linear_qkv", "linear_proj")),
        ("[gate_proj, up_proj, down_proj]", ("linear_fc1", "linear_fc2")),
        ("[qkv_proj, gate_up_proj]", ("linear_qkv", "linear_fc1")),
        ("[linear_qkv, q_proj]", ("linear_qkv",)),
        ("q_proj,k_proj,v_proj", ("linear_qkv",)),
    ],
)
def test_targets_that_are_whole_matrices(minimal, names, targets):
    found = load_config(minimal, ["lora.rank=1", f"lora.targets={names}"]).lora
    assert found.targets == targets


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["lora.targets=[q_proj, v_proj]"],
         "lora.targets=q_proj, v_proj without k_proj: they are one matrix here, with one A: name "
         "q_proj, k_proj, v_proj, or linear_qkv"),
        (["lora.targets=[gate_proj, down_proj]"], "gate_proj without up_proj"),
        (["lora.targets=[lm_head, o_proj]"],
         "lora.targets=lm_head: not a matrix that can have adapters: legal are linear_qkv"),
        (["lora.alpha=32"], "lora.alpha=32.0 without lora.rank: every weight would be trained"),
        (["lora.rslora=true", "lora.dropout=0.1", "lora.targets=[o_proj]"],
         "lora.rslora=True, lora.dropout=0.1, lora.targets=linear_proj without lora.rank"),
        (["lora.targets=[]"], "lora.targets=[]: name at least one"),
        (["lora.rank=0"], "lora.rank=0: must be >= 1"),
        (["lora.dropout=1"], "lora.dropout=1.0: must be in [0, 1)"),
    ],
)  # fmt: skip
def test_what_is_not_legal(minimal, keys, expected):
    with pytest.raises(UserError) as caught:
        load_config(minimal, keys)
    assert expected in str(caught.value)


def test_dropout_with_context_parallel_ranks(minimal):
    config = load_config(minimal, ["lora.rank=4", "lora.dropout=0.1", "parallel.context=2"])
    with pytest.raises(UserError, match=r"lora\.dropout=0\.1 with parallel\.context=2.*set it to"):
        config.validate(2, None)


MIXED = {
    "model_type": "qwen3_moe", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 20,
    "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2,
    "mlp_only_layers": [1], "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "side", "name"),
    [
        ("all-linear", 12, "linear_fc2"),
        ("[linear_fc1, linear_qkv]", 24, "linear_fc1"),
        ("linear_qkv", 32, "linear_qkv"),
        ("o_proj", 24, "linear_proj"),
    ],
)
def test_a_rank_beyond_the_shorter_side_of_a_matrix(minimal, targets, side, name):
    spec, keys = spec_from_hf(MIXED), [f"lora.targets={targets}", "data.max_length=64"]
    load_config(minimal, [*keys, f"lora.rank={side}"]).validate(1, spec)
    beyond = load_config(minimal, [*keys, f"lora.rank={side + 1}"])
    beyond.validate(1, None)
    named = rf"lora\.rank={side + 1}: must be <= {side}, the shorter side of {name}: .*; lower it"
    with pytest.raises(UserError, match=named):
        beyond.validate(1, spec)


def test_alpha_is_twice_the_rank_unless_it_is_given():
    assert LoraConfig(rank=6).alpha_used == 12
    assert LoraConfig(rank=6, alpha=3).alpha_used == 3


@pytest.mark.parametrize(
    ("keys", "lora"),
    [
        (["model.lora_rank=32", "model.lora_alpha=16", "model.target_modules=all-linear"],
         LoraConfig(rank=32, alpha=16.0)),
        (["model.lora_rank=0", "model.lora_alpha=16"], LoraConfig()),
        (["model.lora_rank=8", "model.target_modules=[q_proj, k_proj, v_proj]"],
         LoraConfig(rank=8, targets=("linear_qkv",))),
        (["lora_rank=8", "lora_alpha=16", "lora_dropout=0.05", "lora_target=all"],
         LoraConfig(rank=8, alpha=16.0, dropout=0.05)),
        (["lora_rank=8", "lora_target='o_proj,down_proj'", "use_rslora=true"],
         LoraConfig(rank=8, rslora=True, targets=("linear_proj", "linear_fc2"))),
    ],
)  # fmt: skip
def test_keys_of_the_released_trainers(minimal, keys, lora):
    config = load_config(minimal, keys)
    assert config.lora == lora
    assert isinstance(config, RunConfig)
    assert config.parallel == ParallelConfig()
