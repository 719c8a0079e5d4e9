"""Configuration: strict reading, released spellings, and every impossible layout."""

import dataclasses
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megatron_deft.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    config_help,
    dump_yaml,
    load_config,
    to_dict,
)
from megatron_deft.errors import UserError

EXAMPLES = Path(__file__).parent.parent / "examples" / "configs"
MINIMAL = "run_dir: runs/a\nmodel: {load: weights}\ndata: {train_files: [train.parquet]}\n"


@pytest.fixture
def write(tmp_path):
    def to_file(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return to_file


@pytest.fixture
def minimal(write):
    return write(MINIMAL)


@dataclass(frozen=True)
class Shape:
    num_layers: int = 28
    ffn_hidden_size: int = 8960
    num_attention_heads: int = 12
    num_query_groups: int = 2
    max_position_embeddings: int = 4096


def make(**sections) -> RunConfig:
    given = {
        "run_dir": "runs/a",
        "model": ModelConfig(load="weights"),
        "data": DataConfig(train_files=("train.parquet",)),
    }
    return RunConfig(**(given | sections))


# Reading


def test_minimal_file_has_the_published_defaults(minimal):
    config = load_config(minimal)
    assert config == make()
    assert (config.objective, config.reduction, config.seed) == ("deft", "token", 1234)
    assert config.optim == OptimConfig(
        lr=1e-5, min_lr=0.0, schedule="cosine", warmup_ratio=0.1, betas=(0.9, 0.95),
        weight_decay=0.01, clip_grad=1.0,
    )  # fmt: skip
    assert (config.train.global_batch, config.train.epochs, config.train.steps) == (256, 1.0, None)
    assert config.parallel.vocab_pad_multiple == 128


def test_overrides_beat_the_file_and_values_are_yaml(minimal):
    config = load_config(
        minimal,
        [
            "optim.lr=2e-5", "optim.eps=1E-6", "train.steps=20", "data.val_files=[a.jsonl,b.jsonl]",
            "data.prompt_dict_keys=null", "parallel.sequence=true", "train.resume=no",
            "optim.betas=[0.9,0.999]", "monitor.tensorboard=auto",
            "objective=eaft(power=2, entropy=exact)",
            "optim.clip_grad=0", "data.train_files=one.parquet", "seed=1", "seed=010",
        ],
    )  # fmt: skip
    assert config.optim.lr == 2e-5
    assert config.optim.eps == 1e-6
    assert (config.train.steps, config.train.epochs) == (20, None)
    assert config.data.val_files == ("a.jsonl", "b.jsonl")
    assert config.data.train_files == ("one.parquet",)
    assert config.data.prompt_dict_keys == ()
    assert config.parallel.sequence is True
    assert config.train.resume == "no"
    assert config.optim.betas == (0.9, 0.999)
    assert config.objective == "eaft(power=2, entropy=exact)"
    assert config.optim.clip_grad == 0.0
    assert isinstance(config.optim.clip_grad, float)
    assert config.seed == 10  # the last of two overrides, decimal


def test_yaml_numbers_and_words_are_those_of_yaml_1_2(write):
    text = MINIMAL + "optim: {lr: 2e-5, min_lr: .0, eps: 1.e-8}\ntrain: {resume: no}\n"
    config = load_config(write(text + "monitor: {experiment: 2024-01-01, tensorboard: true}\n"))
    assert (config.optim.lr, config.optim.min_lr, config.optim.eps) == (2e-5, 0.0, 1e-8)
    assert config.train.resume == "no"
    assert config.monitor.experiment == "2024-01-01"
    assert config.monitor.tensorboard is True


def test_an_empty_section_and_dotted_keys_are_fine(write):
    config = load_config(write(MINIMAL + "optim:\n  # lr: 1\ntrain.micro_batch: 4\n"))
    assert config.optim == OptimConfig()
    assert config.train.micro_batch == 4


def test_home_is_expanded(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    path = write("run_dir: ~/run\nmodel: {load: w}\ndata: {train_files: [~/a.parquet, b]}\n")
    config = load_config(path)
    assert config.run_dir == "/home/someone/run"
    assert config.data.train_files == ("/home/someone/a.parquet", "b")


def test_round_trip_through_yaml(write):
    config = make(
        objective="cayley(floor=0)",
        run_dir="1e5",
        optim=OptimConfig(lr=1e-7, warmup_steps=3),
        train=TrainConfig(steps=5, resume="off"),
        data=DataConfig(train_files=("no", "~", "007", "é b.parquet"), prompt_dict_keys=()),
    )
    assert load_config(write(dump_yaml(config))) == config
    assert to_dict(config)["data"]["train_files"] == ["no", "~", "007", "é b.parquet"]


def test_other_yaml_readers_see_the_same_words(minimal):
    assert yaml.safe_load(dump_yaml(load_config(minimal)))["train"]["resume"] == "no"


# Refusing


def refusal(path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {learning_rat: 1}", ["run.yaml:4", "optim.learning_rat", "Legal: optim.lr"]),
        ("optim:\n  lr_rate: 1", ["run.yaml:5", "optim.lr_rate"]),
        ("train: {lr: 1}", ["train.lr", "Did you mean optim.lr?", "train.global_batch"]),
        ("objectiv: p", ["objectiv", "Did you mean objective?", "run_dir", "optim.*"]),
        ("trainer: {objective_tran: p}", ["Did you mean trainer.objective_trans?"]),
        ("model: 3", ["run.yaml:4", "It is a section", "model.KEY"]),
        ("optim: {lr: fast}", ["run.yaml:4", "optim.lr=fast", "expected finite number, > 0"]),
        ("optim: {lr: .nan}", ["optim.lr=nan", "finite"]),
        ("optim: {lr: -1}", ["optim.lr=-1", "must be > 0"]),
        ("optim: {betas: [0.9, 1.0]}", ["optim.betas=[0.9, 1.0]", "[0, 1)"]),
        ("optim: {betas: 0.9}", ["optim.betas=0.9", "list of 2 finite numbers"]),
        ("optim: {schedule: cosin}", ["one of cosine, wsd, constant, linear"]),
        ("train: {micro_batch: 1.5}", ["train.micro_batch=1.5", "integer"]),
        ("train: {micro_batch: true}", ["train.micro_batch=true", "integer"]),
        ("train: {micro_batch: 0}", ["must be >= 1"]),
        ("train: {micro_batch: '4'}", ["train.micro_batch=4", "expected integer"]),
        ("train: {save_at_end: 1}", ["train.save_at_end=1", "true or false"]),
        ("train: {epochs: 1, steps: 5}", ["train.steps=5", "train.epochs=1", "null"]),
        ("train: {epochs: 0}", ["train.epochs=0", "> 0"]),
        ("monitor: {experiment: 7}", ["monitor.experiment=7", "quotes: '7'"]),
        ("monitor: {tensorboard: 1}", ["monitor.tensorboard=1", "auto, true, false"]),
        ("seed: null", ["seed=null", "integer"]),
        ("seed: 1\nseed: 2", ["run.yaml:5", "seed", "line 4"]),
        ("optim: {lr: 1}\noptim.lr: 1", ["optim.lr", "line 4"]),
        ("run: ${a.b}", ["unknown key run"]),
        ("monitor: {project: '${a.b}'}", ["run.yaml:4", "${a.b}", "write the value out"]),
        ("optim: {lr: [1", ["run.yaml:", "not YAML"]),
        ("optim:\n\tlr: 1", ["run.yaml:5", "not YAML", "\\t"]),
        ("seed: !!python/name:os.system", ["run.yaml:4", "not YAML"]),
        ("data: {balance_dp_token: true}", ["data.balance_dp_token=True", "reduction=token"]),
    ],
)
def test_wrong_files_are_refused(write, text, expected):
    message = refusal(write(MINIMAL + text))
    for part in expected:
        assert part in message


def test_a_key_twice_inside_one_section(write):
    message = refusal(write("run_dir: a\noptim:\n  lr: 1\n  lr: 1\n"))
    assert "run.yaml:4" in message
    assert "optim.lr" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", ["override", "Did you mean optim.lr?"]),
        ("optim.lr", ["key=value"]),
        ("=3", ["key=value"]),
        ("optim.lr=x", ["override", "optim.lr=x"]),
        ("optim={lr: 1}", ["one key at a time"]),
        ("optim.lr=[1", ["not YAML"]),
        ("optim.lr=", ["optim.lr=null"]),
        ("train.resume=''", ["train.resume=", "non-empty"]),
        ("data.train_files=[]", ["data.train_files", "non-empty"]),
        ("data.train_files=[a,'']", ["data.train_files", "non-empty"]),
    ],
)
def test_wrong_overrides_are_refused(minimal, override, expected):
    message = refusal(minimal, override)
    for part in expected:
        assert part in message


def test_missing_keys_and_files(write, tmp_path):
    assert "run_dir, model.load, data.train_files" in refusal(write("seed: 1"))
    assert "no configuration file" in refusal(tmp_path / "absent.yaml")
    assert "is a folder" in refusal(tmp_path)
    assert "is empty" in refusal(write("# nothing\n"))
    assert "key: value" in refusal(write("- a\n- b\n"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(tmp_path / "binary.yaml")


def test_sections_refuse_wrong_values_in_code_too():
    with pytest.raises(UserError, match=r"optim\.lr=-1\.0: must be > 0"):
        OptimConfig(lr=-1.0)
    with pytest.raises(UserError, match="exclude each other"):
        TrainConfig(steps=3, epochs=1.0)
    assert dataclasses.replace(TrainConfig(), steps=3, epochs=None).steps == 3


# Released spellings

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
        model=ModelConfig(load="Qwen/Qwen2.5-Math-1.5B", dtype="bf16"),
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
    assert config.model == ModelConfig(load="/m", dtype="fp32", recompute="full")
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
        (["model.lora_rank=8"], ["model.lora_rank=8", "low-rank"]),
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


# Layouts


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
        ({"parallel": ParallelConfig(context=2)}, 2, ["parallel.context=2", "only 1"]),
        ({"parallel": ParallelConfig(sequence=True)}, 1, ["parallel.sequence=true", "tensor=1"]),
        ({"parallel": ParallelConfig(tensor=2, sequence=True),
          "data": DataConfig(train_files=("a",), max_length=7)}, 2, ["max_length=7", "tensor=2"]),
        ({"parallel": ParallelConfig(tensor=2, pipeline=3)}, 4, ["4 processes", "multiple of 6"]),
        ({}, 0, ["0 processes"]),
        ({"train": TrainConfig(global_batch=30, micro_batch=4)}, 2, ["global_batch=30", "= 8"]),
        ({"parallel": ParallelConfig(tensor=8)}, 8, ["tensor=8", "12 attention heads", "1, 2, 3"]),
        ({"parallel": ParallelConfig(tensor=4)}, 4, ["tensor=4", "2 key-value heads", ": 1, 2"]),
        ({"parallel": ParallelConfig(pipeline=3)}, 3, ["pipeline=3", "28 layers", "7, 14, 28"]),
        ({"data": DataConfig(train_files=("a",), max_length=8192)}, 1,
         ["max_length=8192", "max_position_embeddings=4096"]),
        ({"optim": OptimConfig(lr=1e-5, min_lr=1e-4)}, 1, ["optim.min_lr=0.0001", "1e-05"]),
        ({"optim": OptimConfig(warmup_steps=9), "train": TrainConfig(steps=5)}, 1,
         ["optim.warmup_steps=9", "train.steps=5"]),
        ({"train": TrainConfig(val_every=5)}, 1, ["train.val_every=5", "data.val_files"]),
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
