"""Rotary frequencies as transformers computes them, operation by operation.

The operations and their order are those of transformers/modeling_rope_utils.py, so the result is
the same to the last bit. megatron-core's own llama3 scaling fixes low_freq_factor, high_freq_factor
and the original length at Llama 3.1's values.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_deft.models.families import ModelSpec

Scaling = Mapping[str, Any]


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """The rotary angle per position of each pair of head dimensions.

    Returns: [rotary_dim / 2] float32 on the CPU, radians.
    """
    dim = spec.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float) / dim
    rates = spec.rope_theta**exponents
    if spec.rope_scaling is None:
        return 1.0 / rates
    return SCALED[spec.rope_scaling["rope_type"]](rates, spec, spec.rope_scaling)


def _linear(rates: Tensor, spec: ModelSpec, scaling: Scaling) -> Tensor:
    return 1.0 / rates / scaling["factor"]


def _llama3(rates: Tensor, spec: ModelSpec, scaling: Scaling) -> Tensor:
    """Slow pairs (a turn longer than the original context) are slowed by `factor`, fast ones kept,
    those between interpolated."""
    frequencies, factor = 1.0 / rates, scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original_length = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > original_length / low, frequencies / factor, frequencies)
    smooth = (original_length / wavelength - low) / (high - low)
    interpolated = (1 - smooth) * scaled / factor + smooth * scaled
    is_between = ~(wavelength < original_length / high) * ~(wavelength > original_length / low)
    return torch.where(is_between, interpolated, scaled)


def _yarn(rates: Tensor, spec: ModelSpec, scaling: Scaling) -> Tensor:
    """Pairs that turn more than beta_fast times in the original context are kept, those that turn
    less than beta_slow times slowed by `factor`, with a ramp between (arXiv 2309.00071)."""
    dim, length = spec.rotary_dim, scaling["original_max_position_embeddings"]

    def pair_turning(times: float) -> float:
        return (dim * math.log(length / (times * 2 * math.pi))) / (2 * math.log(spec.rope_theta))

    low, high = pair_turning(scaling["beta_fast"]), pair_turning(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling["factor"] * rates) * (1 - kept) + 1.0 / rates * kept


SCALED: Mapping[str, Callable[[Tensor, ModelSpec, Scaling], Tensor]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
