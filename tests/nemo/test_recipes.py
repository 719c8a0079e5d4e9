"""Recipes build, serialise, load, follow nemo-run's command line; their numbers are published."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_deft.errors import UserError
from megatron_deft.integrations.nemo import deft_finetune_recipe
from megatron_deft.integrations.nemo_settings import MODELS, SETTINGS, find_model
from megatron_deft.published import MODELS as HUB
from tests.nemo.conftest import REASON, has_nemo

needs_nemo = pytest.mark.skipif(not has_nemo(), reason=REASON)
CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
PAIRS = [(dataset, model) for dataset, models in SETTINGS.items() for model in models]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*_*.yaml")), ids=lambda path: path.stem)
def test_settings_are_those_of_the_examples(path: Path) -> None:
    dataset, model = path.stem.split("_", 1)
    found = SETTINGS[dataset][find_model(model)]
    config = yaml.safe_load(path.read_text())
    optim, train = config["optim"], config["train"]
    assert found.lr == float(optim["lr"])
    assert found.min_lr == 0
    assert found.weight_decay == float(optim["weight_decay"])
    assert list(found.betas) == optim["betas"]
    assert found.warmup_steps == int(optim["warmup_ratio"] * found.steps)
    assert found.clip_grad == optim["clip_grad"]
    assert found.max_length == config["data"]["max_length"]
    assert (found.global_batch, found.micro_batch) == (train["global_batch"], train["micro_batch"])
    assert found.steps == train.get("save_every", found.steps)


def test_settings_of_eaft() -> None:
    found = SETTINGS["math"]["qwen3-4b"]
    assert (found.lr, found.min_lr, found.max_length) == (1e-5, 1e-6, 16384)
    assert (found.global_batch, found.steps, found.warmup_steps) == (64, 1056, 52)


def test_every_model_has_settings() -> None:
    assert {model for models in SETTINGS.values() for model in models} == set(MODELS)


def test_names() -> None:
    for name in ("llama-3.1-8b", "meta-llama/Llama-3.1-8B", "LLAMA3.1-8B"):
        assert find_model(name) == "llama-3.1-8b"
    assert find_model("Qwen2.5-Math-7B") == "qwen-2.5-math-7b"
    assert find_model("deepseek-math-7b-base") == "deepseek-math-7b"
    with pytest.raises(UserError, match=r"model=gpt2: legal are qwen-2\.5-math-1\.5b"):
        find_model("gpt2")


@pytest.mark.skipif(has_nemo(), reason="of environments without NeMo")
def test_without_nemo() -> None:
    with pytest.raises(UserError, match="pip install 'nemo-toolkit"):
        deft_finetune_recipe("Llama-3.1-8B")


@needs_nemo
@pytest.mark.parametrize(("dataset", "model"), PAIRS)
def test_recipe(dataset: str, model: str) -> None:
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    recipe = deft_finetune_recipe(model, "eaft", dataset, num_gpus_per_node=2)
    serializer = ZlibJSONSerializer()
    assert serializer.deserialize(serializer.serialize(recipe)) == recipe

    settings = SETTINGS[dataset][model]
    assert recipe.optim.config.lr == settings.lr
    assert recipe.optim.config.weight_decay == settings.weight_decay
    assert recipe.trainer.max_steps == settings.steps
    assert recipe.trainer.val_check_interval == settings.steps
    assert recipe.trainer.check_val_every_n_epoch is None
    assert recipe.trainer.devices == 2
    assert recipe.trainer.strategy.ckpt_async_save is False
    assert recipe.data.seq_length == recipe.model.config.seq_length == settings.max_length
    assert recipe.model.config.calculate_per_token_loss is True
    assert recipe.trainer.callbacks[0].objective == "eaft"
    assert getattr(recipe, "peft", None) is None
    assert recipe.resume.restore_config.path == f"nemo://{HUB[model]}"
    assert recipe.data.dataset_kwargs == {
        "prompt_template": "{input}{output}", "truncation_field": "output", "add_eos": False
    }  # fmt: skip


@needs_nemo
@pytest.mark.parametrize("model", MODELS)
def test_parts_build(model: str) -> None:
    """Everything that asks for no GPU becomes what it is a config of."""
    import fiddle
    from nemo.collections.llm.gpt.model.base import HAVE_TE

    from megatron_deft.integrations.nemo_checkpoint import UNFUSED

    dataset = next(name for name, models in SETTINGS.items() if model in models)
    recipe = deft_finetune_recipe(model, "deft", dataset)
    for field, value in ({} if HAVE_TE else UNFUSED).items():
        setattr(recipe.model.config, field, value)
    config = fiddle.build(recipe.model.config)
    assert config.calculate_per_token_loss
    for field, value in MODELS[model].config.items():
        assert getattr(config, field) == value
    objective = fiddle.build(recipe.trainer.callbacks[0])
    assert objective.objective.spec.startswith("deft")
    assert fiddle.build(recipe.optim).config.lr == SETTINGS[dataset][model].lr
    assert fiddle.build(recipe.data).global_batch_size == SETTINGS[dataset][model].global_batch


@needs_nemo
def test_given_recipe() -> None:
    from nemo.collections.llm.recipes import llama32_1b

    base = llama32_1b.finetune_recipe(peft_scheme="lora")
    recipe = deft_finetune_recipe(base, "dft")
    assert "calculate_per_token_loss" not in base.model.config.__arguments__
    assert recipe.optim.config.lr == base.optim.config.lr
    assert recipe.peft == base.peft
    assert "ckpt_async_save" not in recipe.trainer.strategy.__arguments__
    assert recipe.trainer.callbacks[0].objective == "dft"
    again = deft_finetune_recipe(recipe, "eaft", reduction="micro_batch")
    assert [c for c in again.trainer.callbacks if hasattr(c, "objective")] == [
        again.trainer.callbacks[0]
    ]
    assert again.model.config.calculate_per_token_loss is False

    made = deft_finetune_recipe(llama32_1b.pretrain_recipe, "deft")
    assert made.trainer.strategy.ddp.average_in_collective is False


@needs_nemo
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Llama-3.1-8B", "deaft"), "objective"),
        (("gpt2",), "model=gpt2"),
        (("Qwen2.5-7B", "deft", "math"), "which has: figfont"),
        (("Llama-3.1-8B", "deft", "code"), "dataset=code: legal are math, medical, figfont"),
        ((42,), "expected a NeMo recipe"),
    ],
)
def test_errors(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        deft_finetune_recipe(*arguments)


@needs_nemo
def test_yaml_is_read_back_for_no_recipe() -> None:
    """What `integrations.nemo` says of nemo-run's YAML: of NeMo's own recipes as well."""
    from nemo.collections.llm.recipes import llama32_1b
    from nemo_run.core.serialization.yaml import YamlSerializer

    serializer = YamlSerializer()
    for recipe in (
        llama32_1b.finetune_recipe(peft_scheme=None),
        deft_finetune_recipe("Llama-3.1-8B"),
    ):
        text = serializer.serialize(recipe)
        with pytest.raises(Exception, match="TimingCallback"):
            serializer.deserialize(text)


@needs_nemo
def test_reduction_by_samples_is_refused() -> None:
    with pytest.raises(UserError, match="reduction=sample"):
        deft_finetune_recipe("Llama-3.1-8B", reduction="sample")


@needs_nemo
def test_command_line(tmp_path: Path) -> None:
    """As nemo-run's own command reads --factory and the arguments after it."""
    from nemo.collections import llm
    from nemo_run.cli.cli_parser import parse_cli_args, parse_factory

    import megatron_deft.integrations.nemo_factory  # noqa: F401  (the entry point)

    given = "deft(model=Llama-3.1-8B, dataset=medical, objective=eaft)"
    recipe = parse_factory(llm.finetune, "factory", llm.finetune, given)
    assert recipe == deft_finetune_recipe("Llama-3.1-8B", "eaft", "medical")
    arguments = [
        "optim.config.lr=1e-6",
        "trainer.max_steps=3",
        "trainer.callbacks[0].objective=dft",
        "data.dataset_root=elsewhere",
    ]
    changed = parse_cli_args(recipe, arguments)
    assert changed.optim.config.lr == 1e-6
    assert changed.trainer.max_steps == 3
    assert changed.trainer.callbacks[0].objective == "dft"
    assert changed.data.dataset_root == "elsewhere"
