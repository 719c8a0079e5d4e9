"""How much of the machine a step used: tokens, model FLOPs, and their share of the device's peak.

Model FLOPs are what the model needs, not what was run: the backward pass counts twice the forward,
recomputation nothing, padding nothing, a token of a mixture of experts the experts it goes to, and
attention the keys that each token may see, within its document, above the diagonal none. A weight
that adapters freeze has no gradient, and what comes before the first of them no backward pass.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_deft.models.adapters import Adapters
from megatron_deft.models.families import ModelSpec

# Dense bf16 TFLOP/s of one device by NVIDIA's data sheets, by what torch calls it; the first name
# that is found counts. Without sparsity, which doubles the advertised ones.
PEAK_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "L40S": 362.0,
}


def peak_tflops(device_name: str, dtype: str) -> float | None:
    """The peak of a device that is known, for 16-bit matrix products; None: unknown, or fp32."""
    if dtype == "fp32":
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def visible_pairs(lengths: NDArray[np.int64], window: int | None = None) -> float:
    """Pairs of a token and one that it attends to, itself among them.

    lengths: positions of each document, int64 [n]; window: see ModelSpec.windows
    """
    full = np.asarray(lengths, np.float64)
    if window is None:
        return float((full * (full + 1) / 2).sum())
    short = np.minimum(full, window)
    return float((short * (short + 1) / 2 + (full - short) * window).sum())


SCORES = "scores"  # of attention: both factors depend on the input, and neither is a weight


class Product(NamedTuple):
    """So many rows are multiplied by [inputs, outputs]."""

    name: str
    rows: float
    inputs: int
    outputs: int


def _products(
    spec: ModelSpec, lengths: NDArray[np.int64], head_tokens: float, mtp_layers: int
) -> Iterator[Product]:
    """Those of a forward pass, in its order."""
    tokens, last = float(lengths.sum()), spec.num_layers - 1
    pairs = {window: visible_pairs(lengths, window) for window in set(spec.windows)}
    for number in range(spec.num_layers + mtp_layers):
        if number > last:
            yield Product("eh_proj", tokens, 2 * spec.hidden_size, spec.hidden_size)
        layer = min(number, last)
        for name, inputs, outputs, times in spec.matrices(layer):
            yield Product(name, tokens * times, inputs, outputs)
            if name == "linear_qkv":  # query . key, weight . value
                seen, width = pairs[spec.windows[layer]], 2 * spec.num_attention_heads
                yield Product(SCORES, seen, spec.head_dim, width)
    yield Product("output_layer", head_tokens * (1 + mtp_layers), spec.hidden_size, spec.vocab_size)


def model_flops(
    spec: ModelSpec,
    lengths: NDArray[np.int64],
    head_tokens: float,
    adapters: Adapters | None = None,
    mtp_layers: int = 0,
) -> float:
    """FLOPs of a forward and backward pass over documents of `lengths` positions.

    Backward a product is computed again for the gradient of its input, if anything before it is
    trained, and once more for that of its weight, if that is.

    head_tokens: how many tokens go through the output layer for the model, and for each head of
                 multi-token prediction (whose labels are at most one fewer a document and head)
    adapters:    what alone is trained; None: every weight is
    mtp_layers:  those heads, each a projection of two hidden states to one and a layer like the
                 model's last
    """
    flows = adapters is None  # a gradient, to the input: the embedding is trained
    total = 0.0
    for name, rows, inputs, outputs in _products(spec, lengths, head_tokens, mtp_layers):
        is_trained = flows if name == SCORES else adapters is None
        total += rows * inputs * outputs * (1 + flows + is_trained)
        if adapters is not None and name in adapters.targets:
            total += rows * adapters.rank * (inputs * (2 + flows) + outputs * 3)  # A, B
            flows = True
    return 2 * total  # a multiplication and an addition


def throughput(
    spec: ModelSpec,
    lengths: NDArray[np.int64],
    kept_tokens: float,
    seconds: float,
    devices: int,
    peak: float | None,
    adapters: Adapters | None = None,
    mtp_layers: int = 0,
) -> dict[str, float]:
    """What a step over documents of `lengths` positions did each second.

    tokens_per_second:      all tokens, of all devices
    kept_tokens_per_second: those that are trained
    tflops:                 model TFLOP/s of one device, every token with the output layer, as
                            Megatron-LM counts
    kept_tflops:            the output layer with kept tokens alone: what the loss asks for
    mfu, kept_mfu:          those over the device's peak, where it is known
    """
    tokens = float(lengths.sum())
    every, kept = (
        model_flops(spec, lengths, through_head, adapters, mtp_layers) * 1e-12 / seconds / devices
        for through_head in (tokens, kept_tokens)
    )
    values = {
        "tokens_per_second": tokens / seconds,
        "kept_tokens_per_second": kept_tokens / seconds,
        "tflops": every,
        "kept_tflops": kept,
    }
    if peak is not None:
        values |= {"mfu": every / peak, "kept_mfu": kept / peak}
    return values
