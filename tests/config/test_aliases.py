"""Keys of the released trainers under their own names."""

import dataclasses
import shlex
from dataclasses import dataclass

import pytest

from megatron_deft.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    load_config,
)
from megatron_deft.errors import UserError
from tests.config.conftest import MINIMAL


@dataclass(frozen=True)
class Shape:
    num_layers: int = 28
    ffn_hidden_size: int = 8960
    num_attention_heads: int = 12
    num_query_groups: int = 2
    context_length: int = 4096


def make(**sections) -> RunConfig:
    given = {
        "run_dir": "runs/a",
        "model": ModelConfig(load="weights"),
        "data": DataConfig(train_files=("train.parquet",)),
    }
    return RunConfig(**(given | sections))


DEFT_COMMAND = """
    data.train_files=./data/math/train.parquet data.val_files=./data/math/val.parquet
    data.prompt_key=extra_info data.response_key=extra_info data.train_batch_size=256
    data.max_length=3072 optim.lr=5e-5 data.prompt_dict_keys=['question']
    data.response_dict_keys=['answer'] data.micro_batch_size_per_gpu=4
    data.use_original_prompt=True model.partial_pretrain=Qwen/Qwen2.5-Math-1.5B model.use_liger=True
    model.fsdp_config.model_dtype=bf16 optim.weight_decay=1e-5
    trainer.default_local_dir=./checkpoints/math/x trainer.project_name=math
    trainer.experiment_name="x-20250101" trainer.logger=['console','wandb']
    trainer.default_hdfs_dir=null trainer.test_freq=100000 trainer.save_freq=264
    trainer.total_epochs=1 ulysses_sequence_parallel_size=1 use_remove_padding=true
    trainer.objective_trans=GeneralFamily-8
"""


def test_the_released_deft_command_line_means_the_same_here(write):
    # bash removes the quotes of ['question'] as shlex does, so YAML sees [question]
    config = load_config(write("seed: 1\n"), shlex.split(DEFT_COMMAND))
    assert config == make(
        seed=1,
        objective="GeneralFamily-8",
        run_dir="./checkpoints/math/x",
        model=ModelConfig(hf="Qwen/Qwen2.5-Math-1.5B", dtype="bf16"),
        data=DataConfig(
            train_files=("./data/math/train.parquet",), val_files=("./data/math/val.parquet",),
            max_length=3072, use_original_prompt=True,
        ),
        optim=OptimConfig(lr=5e-5, weight_decay=1e-5),
        train=TrainConfig(global_batch=256, micro_batch=4, save_every=264, val_every=100000),
        monitor=dataclasses.replace(
            config.monitor, project="math", experiment="x-20250101", wandb=True, tensorboard="auto"
        ),
    )  # fmt: skip
    config.validate(2, None)


VERL_FILE = """
data:
  train_batch_size: 64
  micro_batch_size: null
  micro_batch_size_per_gpu: 8
  train_files: /d/train.parquet
  val_files: /d/test.parquet
  prompt_key: question
  response_key: answer
  prompt_dict_keys: null
  response_dict_keys: null
  multiturn: {enable: true, messages_key: turns, tools_key: tools}
  max_length: 1024
  truncation: error
  balance_dp_token: False
  chat_template: null
  custom_cls: {path: null, name: null}
model:
  partial_pretrain: /m
  fsdp_config: {model_dtype: fp32, wrap_policy: {min_num_params: 0}, cpu_offload: False,
                offload_params: False}
  external_lib: null
  enable_gradient_checkpointing: True
  trust_remote_code: False
  lora_rank: 0
  lora_alpha: 16
  target_modules: all-linear
  strategy: fsdp2
optim: {lr: 1e-5, betas: [0.9, 0.95], weight_decay: 0.01, warmup_steps_ratio: 0.2, clip_grad: 1.0,
        lr_scheduler: wsd}
ulysses_sequence_parallel_size: 1
use_remove_padding: False
trainer:
  default_local_dir: /c
  default_hdfs_dir: null
  project_name: gsm8k-sft
  experiment_name: test
  total_epochs: 4
  total_training_steps: null
  logger: ['console', 'tensorboard']
  seed: 1
  save_freq: -1
  test_freq: -1
  max_ckpt_to_keep: 3
  resume_mode: disable
  resume_from_path: null
"""


def test_a_verl_file_is_read(write):
    config = load_config(write(VERL_FILE))
    assert config.data.format == "messages"
    assert config.data.messages_key == "turns"
    assert config.data.prompt_dict_keys == ()
    assert config.model == ModelConfig(hf="/m", dtype="fp32", recompute="full")
    assert config.optim == OptimConfig(lr=1e-5, warmup_ratio=0.2, schedule="wsd")
    assert config.train == TrainConfig(
        global_batch=64, micro_batch=8, epochs=4.0, keep_checkpoints=3, resume="no"
    )
    assert config.monitor.tensorboard is True


@pytest.mark.parametrize(
    ("keys", "objective"),
    [
        (["use_eaft_loss=true", "eaft_alpha=1.0"], "eaft(power=1.0)"),
        (["enable_eaft_loss=true", "eaft_alpha=2"], "eaft(power=2)"),
        (["use_eaft_loss=true"], "eaft(power=1.0)"),
        (["use_eaft_loss=false", "eaft_alpha=2"], "deft"),
        (["use_dft_loss=true"], "dft"),
        (["enable_dft_loss=false", "objective=p"], "p"),
        (["use_dft_loss=true", "objective=dft"], "dft"),
    ],
)
def test_loss_switches_of_llama_factory_and_ms_swift(minimal, keys, objective):
    config = load_config(minimal, keys)
    assert config.objective == objective
    config.validate(1, None)


def test_ms_swift_megatron_recipe(minimal):
    keys = (
        "tensor_model_parallel_size=2 sequence_parallel=true micro_batch_size=4 "
        "global_batch_size=64 lr=1e-5 lr_warmup_fraction=0.05 min_lr=1e-6 max_epochs=1 "
        "save_interval=100 max_length=16384 enable_eaft_loss=true eaft_alpha=1.0"
    )
    config = load_config(minimal, keys.split())
    assert config.optim == OptimConfig(lr=1e-5, min_lr=1e-6, warmup_ratio=0.05)
    assert config.train == TrainConfig(global_batch=64, micro_batch=4, save_every=100)
    assert config.parallel == ParallelConfig(tensor=2, sequence=True)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["data.train_batch_size=64", "train.global_batch=32"],
         ["train.global_batch", "data.train_batch_size=64", "train.global_batch=32"]),
        (["use_dft_loss=true", "use_eaft_loss=true"], ["use_eaft_loss", "use_dft_loss"]),
        (["use_dft_loss=true", "trainer.objective_trans=p"], ["trainer.objective_trans=p"]),
        (["data.balance_dp_token=true"], ["leave it out", "reduction=token"]),
        (["model.lora_rank=8", "model.target_modules=[q_proj]"], ["q_proj without k_proj"]),
        (["gradient_accumulation_steps=4"], ["leave it out", "train.global_batch"]),
        (["trainer.n_gpus_per_node=8"], ["--nproc-per-node"]),
        (["trainer.logger=[mlflow]"], ["mlflow", "wandb"]),
        (["trainer.logger=3"], ["trainer.logger=3", "list"]),
        (["data.train_batch_size=x"], ["data.train_batch_size", "train.global_batch=x"]),
        (["data.truncation=left"], ["one of right, error, drop"]),
        (["eaft_alpha=x", "use_eaft_loss=true"], ["eaft(power=x)"]),
        (["use_eaft_loss=yes"], ["use_eaft_loss=yes", "true or false"]),
        (["use_dft_loss=1"], ["use_dft_loss=1", "true or false"]),
    ],
)  # fmt: skip
def test_released_keys_that_contradict_or_cannot_be_honoured(minimal, keys, expected):
    with pytest.raises(UserError) as caught:
        load_config(minimal, keys).validate(1, None)
    for part in expected:
        assert part in str(caught.value)


def test_the_same_value_under_two_names_is_fine(minimal):
    config = load_config(minimal, ["data.train_batch_size=64", "train.global_batch=64"])
    assert config.train.global_batch == 64


def test_an_override_beats_the_file_under_either_name(write):
    path = write(MINIMAL + "trainer: {objective_trans: p}\ntrain: {global_batch: 8}\n")
    config = load_config(path, ["objective=nll", "data.train_batch_size=16"])
    assert (config.objective, config.train.global_batch) == ("nll", 16)
    path = write(MINIMAL + "use_eaft_loss: true\n")
    assert load_config(path, ["eaft_alpha=3"]).objective == "eaft(power=3)"
    assert load_config(path, ["use_eaft_loss=false"]).objective == "deft"
    assert load_config(path, ["objective=p"]).objective == "p"
