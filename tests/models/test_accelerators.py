"""What needs TransformerEngine, apex or a GPU is refused by its key where they are not."""

import importlib.machinery
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_deft.cli import main
from megatron_deft.config import ModelConfig, MonitorConfig, dump_yaml
from megatron_deft.errors import UserError
from megatron_deft.models import accelerators
from megatron_deft.models.accelerators import (
    FP8_RECIPES,
    adam_source,
    fp8_fields,
    obstacle_to_fp8,
    obstacle_to_gradient_accumulation_fusion,
)
from megatron_deft.training import obstacles
from tests.distributed import run_ranks
from tests.training.lora_ranks import hear
from tests.training.ranks import config

NO_GPU = "it needs a GPU, and there is none"
MISSING: dict[str, tuple[dict[str, Any], str]] = {
    "fp8": (
        {"model.dtype": "bf16", "model.fp8": "delayed"},
        f"model.fp8=delayed: {NO_GPU}; set it to null",
    ),
    "fusion": (
        {"parallel.gradient_accumulation_fusion": "true"},
        f"parallel.gradient_accumulation_fusion=true: {NO_GPU}; set it to auto or false",
    ),
    "offload": ({"optim.cpu_offload": 0.25}, f"optim.cpu_offload=0.25: {NO_GPU}; set it to 0"),
    "ring": (
        {"parallel.context": 2, "parallel.context_comm": "p2p"},
        "parallel.context_comm=p2p: it needs TransformerEngine, which is not here; "
        "set it to all_gather or null",
    ),
}


def test_a_run_refuses_them_before_it_prepares_data(base: Path, tmp_path: Path) -> None:
    configs = {name: config(base, tmp_path / name, **keys) for name, (keys, _) in MISSING.items()}
    # one process would be refused for two context-parallel ranks
    del configs["ring"]
    said = run_ranks(1, hear, list(configs.values()))[0]
    assert dict(zip(configs, said, strict=True)) == {name: MISSING[name][1] for name in configs}
    assert not any((tmp_path / name).exists() for name in configs)


@pytest.mark.parametrize("name", MISSING)
def test_a_dry_run_names_them_and_goes_on(
    base: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, expected = MISSING[name]
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(config(base, tmp_path / "run", **keys)))
    processes = ["--nproc-per-node", "2"] if name == "ring" else []
    assert main(["train", str(file), "--dry-run", *processes]) == 0
    said = capsys.readouterr()
    assert said.err == f"megatron-deft: warning: not on this machine: {expected}\n"


def test_a_monitor_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstacles, "is_installed", lambda package: False)
    assert obstacles.obstacles_to_monitors(MonitorConfig()) == []
    (line,) = obstacles.obstacles_to_monitors(MonitorConfig(wandb=True, tensorboard="auto"))
    assert line.startswith("monitor.wandb=true, but wandb is not installed: `pip install wandb`")


def test_a_dry_run_that_asks_for_nothing_special_imports_nothing_heavy(
    base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(config(base, tmp_path / "run")))
    code = (
        "import sys, megatron_deft.cli as cli\n"
        f"cli.main(['train', {str(file)!r}, '--dry-run'])\n"
        "print('loaded:', [name for name in ('megatron', 'torch') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "loaded: []"


def test_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(accelerators, "has_transformer_engine", lambda: False)
    assert "TransformerEngine" in obstacle_to_fp8("mxfp8")
    assert "fused_weight_gradient_mlp_cuda" in obstacle_to_gradient_accumulation_fusion()
    kernel = ModuleType("fused_weight_gradient_mlp_cuda")
    kernel.__spec__ = importlib.machinery.ModuleSpec(kernel.__name__, None)
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    assert obstacle_to_gradient_accumulation_fusion() == ""


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_fp8_is_asked_of_transformer_engine(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Manager:
        @staticmethod
        def is_fp8_available() -> tuple[bool, str]:
            return True, ""

        @staticmethod
        def is_mxfp8_available() -> tuple[bool, str]:
            return False, "compute capability 10 is needed"

    engine = ModuleType("transformer_engine.pytorch.fp8")
    engine.FP8GlobalStateManager = Manager  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(accelerators, "has_transformer_engine", lambda: True)
    expected = {"mxfp8": "compute capability 10", "blockwise": "install a newer one"}
    if recipe in expected:
        assert expected[recipe] in obstacle_to_fp8(recipe)
    else:
        assert obstacle_to_fp8(recipe) == ""
    assert fp8_fields(recipe)["fp8_recipe"] == recipe
    assert fp8_fields(None) == {}


def test_adam_here_is_torchs() -> None:
    assert adam_source() == "torch"


def test_fp8_goes_with_bf16() -> None:
    with pytest.raises(UserError, match=r"model\.fp8=mxfp8 with model\.dtype=fp16"):
        ModelConfig(load="w", fp8="mxfp8", dtype="fp16")
    layernorm = {"recompute": "selective", "recompute_modules": ("layernorm",)}
    with pytest.raises(UserError, match=r"layernorm with model\.fp8=delayed"):
        ModelConfig(load="w", fp8="delayed", **layernorm)
    ModelConfig(load="w", fp8="mxfp8", **layernorm)
