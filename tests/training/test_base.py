"""A run starts from a Hugging Face folder as it does from the weights that import makes of it."""

import json
from pathlib import Path

import pytest

from megatron_deft.config import ModelConfig
from megatron_deft.errors import UserError
from megatron_deft.training.base import read_base
from tests.distributed import run_ranks
from tests.training.ranks import config, metrics, same_but_time, train_all


@pytest.mark.parametrize("layout", [{}, {"parallel.tensor": 2}], ids=["whole", "tensor"])
def test_the_same_run_from_both(base: Path, tmp_path: Path, layout: dict[str, int]) -> None:
    world = layout.get("parallel.tensor", 1)
    common = {"train.steps": 3, "train.save_at_end": "true", **layout}
    configs = [
        config(base, tmp_path / "load", **common),
        config(base, tmp_path / "hf", **common, **{"model.load": "null", "model.hf": base / "hf"}),
    ]
    run_ranks(world, train_all, configs)
    ours, theirs = (same_but_time(metrics(Path(cfg.run_dir))) for cfg in configs)
    assert ours == theirs
    steps = [tmp_path / name / "checkpoints" / "step_00000003" for name in ("load", "hf")]
    manifests = [json.loads((step / "megatron_deft.json").read_text()) for step in steps]
    assert manifests[0]["base"] == manifests[1]["base"] == "hf"
    files = [sorted(p.name for p in (step / "hf").iterdir()) for step in steps]
    assert files[0] == files[1]
    assert not any(name.endswith(".safetensors") for name in files[1]), "the weights are not copied"


def test_one_of_the_two_is_named() -> None:
    with pytest.raises(UserError, match=r"neither is set; set one of them"):
        ModelConfig()
    with pytest.raises(UserError, match=r"a and b; set one of them"):
        ModelConfig(load="a", hf="b")


def test_each_says_what_the_other_is_for(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a Hugging Face folder: set model\.hf="):
        read_base(ModelConfig(load=str(base / "hf")))
    with pytest.raises(UserError, match=r"one of ours: set model\.load"):
        read_base(ModelConfig(hf=str(base / "megatron")))
    with pytest.raises(UserError, match=r"hf download Qwen/Nothing"):
        read_base(ModelConfig(hf="Qwen/Nothing"))
    with pytest.raises(UserError, match=r"is not a folder"):
        read_base(ModelConfig(hf=str(tmp_path / "nowhere")))
