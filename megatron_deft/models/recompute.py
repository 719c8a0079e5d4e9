"""Which activations are computed again in the backward pass: megatron-core's own recomputation."""

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from megatron.core.tensor_parallel import random

from megatron_deft.models.spec import has_transformer_engine


def recompute_fields(
    how: str, modules: Sequence[str] = ("core_attn",), method: str = "uniform", layers: int = 1
) -> dict[str, Any]:
    """The fields of TransformerConfig.

    how: "none"; "selective": the activations of `modules`; "full": of whole layers
    modules: of core_attn (scores and weights of attention), layernorm (what both norms of a layer
        make), mlp, moe (a layer's experts, router included). Rejected: moe_act needs grouped
        products of experts, mla_up_proj and shared_experts are of models that no family here is.
    method, layers: full: "uniform" keeps the input of every `layers`-th layer, "block" recomputes
        the first `layers` layers of each pipeline stage one by one, and no other
    """
    if how == "none":
        return {}
    if how == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": method,
            "recompute_num_layers": layers,
        }
    assert how == "selective", how
    if "layernorm" in modules and not has_transformer_engine():
        _without_transformer_engine()
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


def _without_transformer_engine() -> None:
    """megatron-core 0.16 drops a norm's output with these three at hand, FP8 or not, and has them
    of TransformerEngine alone."""
    for name, stand_in in (
        ("FP8GlobalStateManager", SimpleNamespace(is_fp8_enabled=lambda: False)),
        ("activation_recompute_forward", lambda **_: nullcontext()),
        ("fp8_autocast", lambda **_: nullcontext()),
    ):
        if not hasattr(random, name):
            setattr(random, name, stand_in)
