"""The published settings: those of the releases, of the examples, and settings that can run."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_deft.config import RunConfig, load_config
from megatron_deft.data.prepare.released import MATH, MEDICAL
from megatron_deft.evaluation.log import labels_of
from megatron_deft.objectives import OBJECTIVES, parse
from megatron_deft.one_click.script import Experiment, configuration, file_name
from megatron_deft.published import MODELS, RECIPES
from tests.oracle import SPECS

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"
CASES = [
    (recipe, dataset, key)
    for recipe, sets in RECIPES.items()
    for dataset, settings in sets.items()
    for key in settings.models
]


def experiment(recipe: str, dataset: str, key: str, **changes: object) -> Experiment:
    made = Experiment(
        recipe_name=recipe, dataset=dataset, key=key, objective=RECIPES[recipe][dataset].objective,
        processes=2, devices=None, root=Path("/project"), script=Path("/project/a.sh"),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def config_of(made: Experiment, folder: Path) -> RunConfig:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(configuration(made)))
    return load_config(path)


@pytest.mark.parametrize(("recipe", "dataset", "key"), CASES)
def test_a_recipe_is_a_configuration_that_can_run(
    recipe: str, dataset: str, key: str, tmp_path: Path
) -> None:
    made = experiment(recipe, dataset, key)
    config = config_of(made, tmp_path)
    for processes in (1, 2, 4, 8):
        config.validate(processes, None)
    assert config.objective.startswith(recipe)
    assert config.data.train_files == (f"{made.data}/train.parquet",)
    smoke = replace(made, smoke=True)
    config_of(smoke, tmp_path).validate(2, None)
    assert smoke.data != made.data  # a few rows are not taken for the data set later
    assert smoke.name != made.name


def test_every_objective_names_a_model_that_can_be_evaluated() -> None:
    written = {f"{name}({key}=0.5)" for name, row in OBJECTIVES.items() for key in row.parameters}
    legal = {spec for spec in written if not spec.endswith(("floor=0.5)", "entropy=0.5)"))}
    specs = sorted({*SPECS, *legal, "eaft(power=1, entropy=exact)", "tsallis(q=5e-1)"})
    assert len(specs) > 20
    for spec in specs:
        made = experiment("deft", "math", "qwen-2.5-math-7b", objective=spec, smoke=True)
        assert labels_of([Path("a")], [made.name]) == [made.name]
    names = {parse(spec).spec: file_name(spec) for spec in specs}
    assert len(set(names.values())) == len(names)  # no two objectives share a folder


# learning rate, longest sample, samples of a micro-batch
PUBLISHED = {
    ("deft", "math", "qwen-2.5-math-1.5b"): (5e-5, 3072, 4),
    ("deft", "math", "qwen-2.5-math-7b"): (5e-5, 3072, 4),
    ("deft", "math", "llama-3.1-8b"): (2e-5, 3072, 4),
    ("deft", "math", "deepseek-math-7b"): (5e-5, 3072, 4),
    ("deft", "medical", "llama-3.2-3b"): (5e-5, 800, 16),
    ("deft", "medical", "llama-3.1-8b"): (2e-5, 800, 16),
    ("deft", "medical", "qwen-2.5-1.5b"): (5e-5, 800, 16),
    ("deft", "medical", "qwen-2.5-math-7b"): (5e-5, 800, 16),
    ("deft", "figfont", "qwen-2.5-7b"): (5e-5, 800, 16),
    ("deft", "figfont", "qwen-2.5-1.5b"): (5e-5, 800, 16),
    ("deft", "figfont", "llama-3.1-8b"): (2e-5, 800, 16),
    ("deft", "figfont", "llama-3.2-3b"): (5e-5, 800, 16),
    ("dft", "math", "qwen-2.5-math-1.5b"): (5e-5, 2048, 4),
    ("eaft", "math", "qwen3-0.6b"): (1e-5, 16384, 4),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_published_numbers(case: tuple[str, str, str], tmp_path: Path) -> None:
    config = config_of(experiment(*case), tmp_path)
    found = config.optim.lr, config.data.max_length, config.train.micro_batch
    assert found == PUBLISHED[case]
    assert config.optim.betas == (0.9, 0.95)
    assert config.optim.schedule == "cosine"
    assert config.optim.weight_decay == (1e-5 if case[1] == "figfont" else 0.01)
    is_eaft = case[0] == "eaft"
    assert config.train.global_batch == (64 if is_eaft else 256)
    assert config.optim.warmup_ratio == (0.05 if is_eaft else 0.1)
    assert config.optim.min_lr == (1e-6 if is_eaft else 0.0)
    assert config.train.epochs == 1


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*_*.yaml")), ids=lambda path: path.stem)
def test_the_examples_hold_the_same(path: Path, tmp_path: Path) -> None:
    dataset, _, model = path.stem.partition("_")
    (key,) = (k for k, name in MODELS.items() if name.rpartition("/")[2].lower() == model)
    example, ours = load_config(path), config_of(experiment("deft", dataset, key), tmp_path)
    ours = replace(
        ours, run_dir=example.run_dir, model=replace(ours.model, load=example.model.load),
        monitor=replace(ours.monitor, experiment=example.monitor.experiment),
    )  # fmt: skip
    assert ours == example


def test_prompts_and_columns_are_released_ones() -> None:
    figfont = {"qwen_prompt", "llama_prompt"}
    medical = {f"{family}_prompt" for family in MEDICAL}
    legal = {"math": set(MATH), "medical": medical, "figfont": figfont}
    for recipe, dataset, key in CASES:
        model = RECIPES[recipe][dataset].models[key]
        assert model.prompt_type in legal[dataset]
        assert key in MODELS
        family = "llama" if key.startswith("llama") else key[:4]
        if model.keys.get("data.use_original_prompt"):
            assert model.keys["data.prompt_dict_keys"] == [f"{family}_prompt"]
        assert family in model.prompt_type or (family, model.prompt_type) == (
            "deep", "deepseek-math"
        )  # fmt: skip
