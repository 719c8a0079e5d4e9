"""What every contender of `bench head` works on."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_deft.benchmarks.arguments import HeadPlan
from megatron_deft.benchmarks.peers import IGNORE
from megatron_deft.benchmarks.shared import SPREAD, TORCH_DTYPES


def make_inputs(plan: HeadPlan, device: str) -> tuple[Tensor, Tensor, Tensor, dict[float, Tensor]]:
    """hidden [N, H], weight [V, H] with its main_grad, labels [N] and for each ignored fraction."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = TORCH_DTYPES[plan.dtype]
    hidden = torch.empty(plan.tokens, plan.hidden, dtype=dtype, device=device)
    hidden.normal_(generator=generator)
    weight = torch.empty(plan.vocabulary, plan.hidden, dtype=dtype, device=device)
    weight.normal_(0.0, SPREAD / plan.hidden**0.5, generator=generator).requires_grad_()
    # written, not only reserved: memory that nobody has touched is not there yet
    main_grad = torch.empty_like(weight, dtype=torch.float32, requires_grad=False).fill_(0.0)
    weight.main_grad = main_grad  # type: ignore[attr-defined]
    labels = torch.randint(plan.vocabulary, (plan.tokens,), device=device, generator=generator)
    # every other token is one that the model expects: at random nearly all gates would be 0
    expected = [(weight.detach() @ part.t()).argmax(0) for part in hidden[::2].split(64)]
    labels[::2] = torch.cat(expected)
    order = torch.randperm(plan.tokens, device=device, generator=generator)
    kept = {f: order >= round(f * plan.tokens) for f in plan.ignored}
    return hidden, weight, labels, {f: labels.where(keep, IGNORE) for f, keep in kept.items()}
