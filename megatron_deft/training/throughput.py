"""How much of the machine a step used: tokens, model FLOPs, and their share of the device's peak.

Model FLOPs are what the model needs, not what was run: the backward pass counts twice the forward,
recomputation nothing, padding nothing, a token of a mixture of experts the experts it goes to, and
attention the keys that each token may see, within its document, above the diagonal none.
"""

import numpy as np
from numpy.typing import NDArray

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


def model_flops(spec: ModelSpec, lengths: NDArray[np.int64], head_tokens: float) -> float:
    """FLOPs of a forward and backward pass over documents of `lengths` positions.

    head_tokens: how many tokens go through the output layer
    """
    hidden, heads, size = spec.hidden_size, spec.num_attention_heads, spec.head_dim
    attention = hidden * size * (2 * heads + 2 * spec.num_query_groups)  # q, out, k, v
    mlp = 3 * hidden * spec.ffn_hidden_size  # gate, up, down
    chosen = 3 * hidden * spec.expert_ffn_hidden_size * spec.experts_per_token
    sparse = len(spec.expert_layers)
    weights = (
        spec.num_layers * attention
        + (spec.num_layers - sparse) * mlp
        + sparse * (chosen + hidden * spec.experts)  # the router's scores
    )
    tokens = float(lengths.sum())
    pairs = {window: visible_pairs(lengths, window) for window in set(spec.windows)}
    seen = sum(pairs[window] for window in spec.windows)
    products = weights * tokens + hidden * spec.vocab_size * head_tokens
    products += 2 * heads * size * seen  # query . key, weight . value
    return 3 * 2 * products  # backward: by inputs and by weights; a multiplication and an addition


def throughput(
    spec: ModelSpec,
    lengths: NDArray[np.int64],
    kept_tokens: float,
    seconds: float,
    devices: int,
    peak: float | None,
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
    scale = 1e-12 / (seconds * devices)
    values = {
        "tokens_per_second": tokens / seconds,
        "kept_tokens_per_second": kept_tokens / seconds,
        "tflops": model_flops(spec, lengths, tokens) * scale,
        "kept_tflops": model_flops(spec, lengths, kept_tokens) * scale,
    }
    if peak is not None:
        values |= {"mfu": values["tflops"] / peak, "kept_mfu": values["kept_tflops"] / peak}
    return values
