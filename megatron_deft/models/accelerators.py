"""Which of NVIDIA's packages this process uses, and why not: TransformerEngine and apex.

Used where they import, never needed. The layers are chosen in models/spec.py (`parts`), Adam by
megatron-core itself.
"""

import importlib.util
from typing import Any

import torch

from megatron_deft.models.families import ModelSpec
from megatron_deft.models.spec import has_transformer_engine

FP8_RECIPES = {  # recipe -> what of TransformerEngine tells whether this GPU has it
    "delayed": "is_fp8_available",
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}


def adam_source() -> str:
    """Whose Adam updates the weights: "TransformerEngine", "apex" or "torch"."""
    from megatron.core import optimizer

    package = optimizer.Adam.__module__.partition(".")[0]
    return {"transformer_engine": "TransformerEngine"}.get(package, package)


def obstacle_to_fp8(recipe: str) -> str:
    """Why no matrix product can run in FP8 by that recipe here, or "" if it can."""
    if not torch.cuda.is_available():
        return "it needs a GPU, and there is none"
    if not has_transformer_engine():
        return "it needs TransformerEngine, which does not import here"
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    ask: Any = getattr(FP8GlobalStateManager, FP8_RECIPES[recipe], None)
    if ask is None:
        return "the TransformerEngine that is installed does not know it: install a newer one"
    is_available, reason = ask()
    return "" if is_available else f"this GPU does not have it: {reason}"


def fp8_fields(recipe: str | None) -> dict[str, Any]:
    """The fields of TransformerConfig: e4m3 forward and e5m2 backward; weights stay in bf16."""
    if recipe is None:
        return {}
    fields: dict[str, Any] = {"fp8": "hybrid", "fp8_recipe": recipe}
    if recipe == "delayed":  # TransformerEngine's own choice; megatron-core's looks one step back
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return fields


def obstacle_to_gradient_accumulation_fusion() -> str:
    """Why weights' gradients cannot be added to main_grad in their own product, or ""."""
    if not torch.cuda.is_available():
        return "it needs a GPU, and there is none"
    # megatron-core's layers, which the embedding's and output's stay, ask for apex's alone
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        return "it needs apex's fused_weight_gradient_mlp_cuda, which is not installed"
    return ""


def obstacle_to_context_comm(way: str, spec: ModelSpec) -> str:
    """Why ranks cannot exchange the keys and values of a sequence that way, or ""."""
    if way == "all_gather":
        return ""
    if not has_transformer_engine():
        return "it needs TransformerEngine, which is not here"
    if spec.attention_softcap is not None:
        return "it needs an attention without a cap on its scores, which this model has"
    return ""


def obstacle_to_cpu_offload() -> str:
    """Why no optimizer state can be moved to host memory, or ""."""
    return "" if torch.cuda.is_available() else "it needs a GPU, and there is none"
