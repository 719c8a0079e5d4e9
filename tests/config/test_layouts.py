"""Runs that can be and runs that cannot, the help, and the example files."""

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_deft.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    config_help,
    load_config,
)
from megatron_deft.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"


@dataclass(frozen=True)
class Shape:
    num_layers: int = 28
    ffn_hidden_size: int = 8960
    num_attention_heads: int = 12
    num_query_groups: int = 2
    context_length: int = 4096
    expert_layers: tuple[int, ...] = ()
    experts: int = 0
    expert_ffn_hidden_size: int = 0


def make(**sections) -> RunConfig:
    given = {
        "run_dir": "runs/a",
        "model": ModelConfig(load="weights"),
        "data": DataConfig(train_files=("train.parquet",)),
    }
    return RunConfig(**(given | sections))


def test_possible_layouts_pass():
    config = make(
        parallel=ParallelConfig(tensor=2, pipeline=4, sequence=True),
        train=TrainConfig(micro_batch=4),
    )
    config.validate(16, Shape())
    assert config.data_parallel(16) == 2
    assert config.micro_batches(16) == 32


@pytest.mark.parametrize(
    ("sections", "world", "expected"),
    [
        ({"objective": "defft"}, 1, ["defft", "deft"]),
        ({"objective": "OnlyTopP-2"}, 1, ["OnlyTopP-2", "0 <= t < 1"]),
        ({"parallel": ParallelConfig(context=2),
          "model": ModelConfig(load="w", hidden_dropout=0.1)}, 2,
         ["model.hidden_dropout=0.1", "parallel.context=2"]),
        ({"parallel": ParallelConfig(context=2),
          "data": DataConfig(train_files=("a",), pack=True, max_length=1023)}, 2,
         ["data.max_length=1023", "multiple of 4, such as 1024"]),
        ({"parallel": ParallelConfig(sequence=True)}, 1, ["parallel.sequence=true", "tensor=1"]),
        ({"parallel": ParallelConfig(tensor=2, pipeline=3)}, 4, ["4 processes", "multiple of 6"]),
        ({}, 0, ["0 processes"]),
        ({"train": TrainConfig(global_batch=30, micro_batch=4)}, 2, ["global_batch=30", "= 8"]),
        ({"parallel": ParallelConfig(tensor=8)}, 8, ["tensor=8", "12 attention heads", "1, 2, 3"]),
        ({"parallel": ParallelConfig(tensor=4)}, 4, ["tensor=4", "2 key-value heads", ": 1, 2"]),
        ({"parallel": ParallelConfig(pipeline=3)}, 3, ["pipeline=3", "28 layers", "7, 14, 28"]),
        ({"data": DataConfig(train_files=("a",), max_length=8192)}, 1,
         ["max_length=8192", "context of 4096 positions"]),
        ({"optim": OptimConfig(lr=1e-5, min_lr=1e-4)}, 1, ["optim.min_lr=0.0001", "1e-05"]),
        ({"optim": OptimConfig(warmup_steps=9), "train": TrainConfig(steps=5)}, 1,
         ["optim.warmup_steps=9", "train.steps=5"]),
        ({"optim": OptimConfig(cpu_offload=0.5),
          "parallel": ParallelConfig(distributed_optimizer=False)}, 1,
         ["optim.cpu_offload=0.5", "parallel.distributed_optimizer=false", "set it to true"]),
        ({"model": ModelConfig(load="w", recompute="full", recompute_layers=3)}, 1,
         ["model.recompute_layers=3", "divide the 28 layers", "1, 2, 4, 7, 14, 28"]),
        ({"model": ModelConfig(load="w", recompute="full", recompute_layers=15,
                               recompute_method="block"),
          "parallel": ParallelConfig(pipeline=2)}, 2,
         ["model.recompute_layers=15", "<= the 14 layers"]),
        ({"model": ModelConfig(load="w", recompute="selective", recompute_modules=("moe",))}, 1,
         ["model.recompute_modules=moe", "no experts"]),
        ({"optim": OptimConfig(loss_scale=8.0)}, 1, ["optim.loss_scale=8", "model.dtype=bf16"]),
        ({"optim": OptimConfig(hysteresis=3, loss_scale=8.0),
          "model": ModelConfig(load="w", dtype="fp16")}, 1,
         ["optim.hysteresis=3", "optim.loss_scale=8", "does not move"]),
        ({"optim": OptimConfig(min_loss_scale=8192.0),
          "model": ModelConfig(load="w", dtype="fp16")}, 1,
         ["optim.min_loss_scale=8192", "<= optim.initial_loss_scale=4096"]),
        ({"train": TrainConfig(val_every=5)}, 1,
         ["train.val_every=5", "data.val_sets, data.val_files or data.split"]),
    ],
)  # fmt: skip
def test_impossible_runs_are_refused(sections, world, expected):
    train = sections.get("train", TrainConfig(global_batch=48))
    config = make(**(sections | {"train": train}))
    with pytest.raises(UserError) as caught:
        config.validate(world, Shape())
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"recompute_modules": ("mlp",)}, ["['mlp']", "recompute=none", "set model.recompute=sel"]),
        ({"recompute": "full", "recompute_modules": ("mlp",)}, ["recompute=full"]),
        ({"recompute": "selective", "recompute_layers": 2}, ["recompute_layers=2", "for full"]),
        ({"mtp_loss_weight": 0.5}, ["model.mtp_loss_weight=0.5 without heads", "model.mtp_layers"]),
        ({"recompute_method": "block"}, ["recompute_method=block", "for full"]),
        ({"recompute": "selective", "recompute_modules": ("moe_act",)},
         ["model.recompute_modules=['moe_act']", "among core_attn, layernorm, mlp, moe"]),
    ],
)  # fmt: skip
def test_recomputation_that_would_not_be_done_is_refused(keys, expected):
    with pytest.raises(UserError) as caught:
        ModelConfig(load="w", **keys)
    for part in expected:
        assert part in str(caught.value)


EXPERTS = Shape(expert_layers=tuple(range(28)), experts=6, expert_ffn_hidden_size=90)


@pytest.mark.parametrize(
    ("parallel", "world", "spec"),
    [
        (ParallelConfig(expert=2), 4, EXPERTS),
        (ParallelConfig(expert=2, tensor=2, sequence=True), 4, EXPERTS),
        (ParallelConfig(pipeline=2, virtual_pipeline=7, expert=3), 6, EXPERTS),
        (ParallelConfig(pipeline=2, virtual_pipeline=14), 4, Shape()),
        (ParallelConfig(virtual_pipeline=1, tensor=2), 2, Shape()),
        (ParallelConfig(expert=2), 2, None),
    ],
)
def test_experts_and_virtual_pipelines_that_pass(parallel, world, spec):
    make(parallel=parallel, train=TrainConfig(global_batch=48)).validate(world, spec)


@pytest.mark.parametrize(
    ("parallel", "world", "spec", "expected"),
    [
        ({"expert": 2}, 2, Shape(), ["parallel.expert=2", "no experts", "set it to 1"]),
        ({"expert": 4}, 4, EXPERTS, ["parallel.expert=4", "6 experts: 1, 2, 3, 6"]),
        ({"expert": 2}, 3, EXPERTS, ["parallel.expert=2", "3 data-parallel ranks", ": 1, 3"]),
        ({"expert": 2, "pipeline": 2}, 2, None,
         ["parallel.expert=2", "1 data-parallel ranks (2 processes", "parallel.pipeline=2"]),
        ({"expert": 2, "tensor": 2}, 4, None, ["parallel.sequence=false", "tensor=2", "to true"]),
        ({"tensor": 2}, 2, EXPERTS, ["parallel.sequence=false", "parallel.tensor to 1"]),
        ({"tensor": 2, "sequence": True}, 2,
         dataclasses.replace(EXPERTS, expert_ffn_hidden_size=45),
         ["tensor=2", "45 channels of an expert"]),
        ({"virtual_pipeline": 2}, 2, Shape(),
         ["parallel.virtual_pipeline=2", "parallel.pipeline=1", "null"]),
        ({"pipeline": 2, "virtual_pipeline": 4}, 2, Shape(),
         ["parallel.virtual_pipeline=4", "14 layers of a pipeline stage: 1, 2, 7, 14"]),
        ({"pipeline": 4, "virtual_pipeline": 7}, 32, Shape(),
         ["parallel.virtual_pipeline=7", "6 micro-batches", "multiple of 32", "null"]),
    ],
)  # fmt: skip
def test_impossible_experts_and_virtual_pipelines_are_refused(parallel, world, spec, expected):
    config = make(parallel=ParallelConfig(**parallel), train=TrainConfig(global_batch=48))
    with pytest.raises(UserError) as caught:
        config.validate(world, spec)
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "layers"),
    [
        ({"pipeline": 3, "account_for_loss": True}, 5),
        ({"pipeline": 2, "account_for_embedding": True, "account_for_loss": True}, 6),
        ({"pipeline": 2, "virtual_pipeline": 2, "account_for_embedding": True,
          "account_for_loss": True}, 6),
        ({"pipeline": 3, "first_stage_layers": 1, "last_stage_layers": 2}, 5),
        ({"pipeline": 4, "last_stage_layers": 2}, 5),
        ({"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 4}, 5),
        ({"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 2}, 6),
    ],
)  # fmt: skip
def test_stages_of_several_lengths_that_pass(parallel, layers):
    config = make(parallel=ParallelConfig(**parallel), train=TrainConfig(global_batch=48))
    config.validate(parallel["pipeline"], dataclasses.replace(Shape(), num_layers=layers))


@pytest.mark.parametrize(
    ("parallel", "layers", "expected"),
    [
        ({"pipeline": 3, "account_for_embedding": True}, 6,
         ["parallel.pipeline=3", "6 layers + 1 (parallel.account_for_embedding): 1, 7"]),
        ({"pipeline": 3}, 5, ["5 layers: 1, 5", "account_for_loss", "first_stage_layers"]),
        ({"account_for_loss": True}, 5, ["account_for_loss=true", "parallel.pipeline=1"]),
        ({"last_stage_layers": 2}, 5, ["last_stage_layers=2 with parallel.pipeline=1"]),
        ({"pipeline": 2, "account_for_loss": True, "first_stage_layers": 2}, 5,
         ["account_for_loss=true and parallel.first_stage_layers=2", "not both"]),
        ({"pipeline": 3, "first_stage_layers": 2}, 5,
         ["first_stage_layers=2", "5 layers", "leave the 2 other stages", "equally many"]),
        ({"pipeline": 3, "first_stage_layers": 4}, 5, ["first_stage_layers=4", "at least one"]),
        ({"pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 2}, 5,
         ["together they must be 5"]),
        ({"pipeline": 2, "virtual_pipeline": 2, "account_for_loss": True}, 5,
         ["virtual_pipeline=2", "the 3 layers, parallel.account_for_loss=true counted", ": 1, 3"]),
        ({"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 4}, 7,
         ["virtual_pipeline=2", "3 layers of a pipeline stage: 1, 3"]),
        ({"overlap_param_gather": True}, 5,
         ["overlap_param_gather=true", "parallel.overlap_grad_reduce=false", "both to true"]),
        ({"overlap_param_gather": True, "overlap_grad_reduce": True,
          "distributed_optimizer": False}, 5, ["parallel.distributed_optimizer=false"]),
        ({"context_comm": "p2p"}, 5, ["context_comm=p2p", "parallel.context=1", "null"]),
        ({"context": 4, "context_comm": "a2a"}, 5,
         ["parallel.context=4", "2 key-value heads of a tensor rank", ": 1, 2"]),
        ({"expert_tensor": 2}, 5, ["expert_tensor=2", "must divide parallel.tensor=1"]),
        ({"tensor": 2, "expert_tensor": 2, "sequence": True}, 5,
         ["expert_tensor=2", "no experts", "null"]),
    ],
)  # fmt: skip
def test_stages_and_overlaps_that_are_refused(parallel, layers, expected):
    config = make(parallel=ParallelConfig(**parallel), train=TrainConfig(global_batch=48))
    world = parallel.get("pipeline", 1) * parallel.get("tensor", 1) * parallel.get("context", 1)
    with pytest.raises(UserError) as caught:
        config.validate(world, dataclasses.replace(Shape(), num_layers=layers))
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("value", [{"expert": 0}, {"virtual_pipeline": 0}])
def test_parallel_sizes_are_at_least_one(value):
    with pytest.raises(UserError, match=">= 1"):
        ParallelConfig(**value)


def test_feed_forward_channels_must_divide():
    config = make(parallel=ParallelConfig(tensor=2))
    with pytest.raises(UserError, match="7 feed-forward channels: 1, 7"):
        config.validate(2, dataclasses.replace(Shape(), ffn_hidden_size=7))


# Help and examples


def test_help_lists_every_key_with_its_meaning_and_is_itself_a_file(write):
    text = config_help()
    config = load_config(
        write(text), ["run_dir=runs/a", "model.load=weights", "data.train_files=train.parquet"]
    )
    assert config == make()
    for section in (RunConfig(run_dir="a", model=config.model, data=config.data), config.optim):
        for declaration in dataclasses.fields(section):
            assert re.search(rf"^ *{declaration.name}:", text, re.M), declaration.name
    for line in text.splitlines():
        assert len(line) <= 100
    assert re.search(r"# peak learning rate.*\[finite number, > 0\]\n  lr: 1.0e-05", text)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_load(path):
    load_config(path).validate(1, None)


@pytest.mark.parametrize(
    ("name", "lr", "max_length", "micro_batch", "weight_decay"),
    [
        ("math_qwen2.5-math-1.5b", 5e-5, 3072, 4, 0.01),
        ("math_qwen2.5-math-7b", 5e-5, 3072, 4, 0.01),
        ("math_llama-3.1-8b", 2e-5, 3072, 4, 0.01),
        ("medical_qwen2.5-1.5b", 5e-5, 800, 16, 0.01),
        ("medical_llama-3.1-8b", 2e-5, 800, 16, 0.01),
        ("figfont_qwen2.5-1.5b", 5e-5, 800, 16, 1e-5),
        ("figfont_llama-3.1-8b", 2e-5, 800, 16, 1e-5),
    ],
)
def test_examples_are_the_published_hyper_parameters(
    name, lr, max_length, micro_batch, weight_decay
):
    config = load_config(EXAMPLES / f"{name}.yaml")
    assert config.optim == OptimConfig(lr=lr, weight_decay=weight_decay)
    assert config.data.max_length == max_length
    assert (config.train.global_batch, config.train.micro_batch) == (256, micro_batch)
    assert (config.train.epochs, config.model.dtype, config.objective) == (1.0, "bf16", "deft")


def test_config_imports_no_torch():
    code = "import sys, megatron_deft.config; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
