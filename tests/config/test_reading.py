"""Strict reading: YAML, overrides, wrong keys and values."""

import dataclasses
from dataclasses import dataclass

import pytest
import yaml

from megatron_deft.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    dump_yaml,
    load_config,
    to_dict,
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


@pytest.mark.parametrize("value", ["1e400", "-.inf", ".nan", "true"])
def test_a_duration_without_end_needs_no_quotes(write, value):
    message = refusal(write(MINIMAL), f"train.exit_duration={value}")
    assert "train.exit_duration=" in message
    assert "or such as 90s, 45m, 3h50m" in message
    assert "quotes" not in message


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
        ("data.train_files=[]", ["data.train_sets or data.train_files"]),
        ("data.train_files=[a,'']", ["data.train_files", "non-empty"]),
    ],
)
def test_wrong_overrides_are_refused(minimal, override, expected):
    message = refusal(minimal, override)
    for part in expected:
        assert part in message


def test_missing_keys_and_files(write, tmp_path):
    assert "run_dir, model.load or model.hf, data.train_sets or data.train_files" in refusal(
        write("seed: 1")
    )
    assert "no configuration file" in refusal(tmp_path / "absent.yaml")
    assert "is a folder" in refusal(tmp_path)
    assert "is empty" in refusal(write("# nothing\n"))
    assert "key: value" in refusal(write("- a\n- b\n"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(tmp_path / "binary.yaml")


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_that_torch_cannot_take_is_refused(seed):
    with pytest.raises(UserError, match=rf"seed={seed}: must be >= 0 and < 2\^63"):
        make(seed=seed)
    assert make(seed=2**63 - 1).seed == 2**63 - 1


def test_sections_refuse_wrong_values_in_code_too():
    with pytest.raises(UserError, match=r"optim\.lr=-1\.0: must be > 0"):
        OptimConfig(lr=-1.0)
    with pytest.raises(UserError, match="exclude each other"):
        TrainConfig(steps=3, epochs=1.0)
    assert dataclasses.replace(TrainConfig(), steps=3, epochs=None).steps == 3


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("{train_sets: [a], train_files: [b]}", ["data.train_sets and data.train_files"]),
        ("{train_sets: [a], val_sets: [b], val_files: [c]}", ["data.val_sets and data.val_files"]),
        (
            "{train_sets: [a, b], train_weights: [1]}",
            ["train_weights=[1.0]", "the 2 data.train_se"],
        ),
        ("{train_sets: [a], train_weights: [0]}", ["data.train_weights=[0.0]: must be > 0"]),
        ("{train_sets: [a], split: [1, 0]}", ["data.split=[1.0, 0.0]: must be > 0"]),
        *(
            (
                f"{{train_sets: [a], split: [9, 1], {key}: [b]}}",
                [f"data.split=[9.0, 1.0] and data.{key}"],
            )
            for key in ("val_sets", "val_files")
        ),
        ("{train_files: [a], split: [9, 1]}", ["data.split=[9.0, 1.0] and data.train_files"]),
    ],
)
def test_sets_and_files_that_do_not_go_together(write, data, expected):
    message = refusal(write(f"run_dir: r\nmodel: {{load: w}}\ndata: {data}\n"))
    for part in expected:
        assert part in message
