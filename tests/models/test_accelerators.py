"""What needs TransformerEngine, apex or a GPU is refused by its key where they are not."""

import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_deft.config import ModelConfig
from megatron_deft.errors import UserError
from megatron_deft.models import accelerators
from megatron_deft.models.accelerators import (
    FP8_RECIPES,
    adam_source,
    fp8_fields,
    obstacle_to_fp8,
    obstacle_to_gradient_accumulation_fusion,
)
from megatron_deft.training.model import build_chunks
from tests.training.ranks import config


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"model.dtype": "bf16", "model.fp8": "delayed"}, "model.fp8=delayed: it needs a GPU"),
        (
            {"parallel.gradient_accumulation_fusion": "true"},
            "parallel.gradient_accumulation_fusion=true: it needs a GPU",
        ),
        (
            {"optim.cpu_offload": 0.25},
            "optim.cpu_offload=0.25: it needs a GPU, and there is none; set it to 0",
        ),
    ],
)
def test_a_run_without_a_gpu_refuses_them(
    tmp_path: Path, keys: dict[str, Any], expected: str
) -> None:
    cfg = config(tmp_path, tmp_path / "run", **keys)
    with pytest.raises(UserError) as caught:
        build_chunks(cfg, None)  # type: ignore[arg-type]  # before the model is looked at
    assert str(caught.value).startswith(expected)


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
