"""float64 objectives, written from the papers' formulas and differentiated by autograd.

Nothing here is shared with the package: the loss is a formula of log p with the rest detached, and
the gradient is whatever autograd makes of it.
"""

import math

import torch
from torch import Tensor


def _top20_entropy(probs: Tensor) -> Tensor:
    top = probs.topk(min(20, probs.shape[-1]), dim=-1).values
    top = top / top.sum(-1, keepdim=True)
    return -(top * top.clamp(min=1e-300).log()).sum(-1)


def _entropy(probs: Tensor) -> Tensor:
    return -(probs * probs.clamp(min=1e-300).log()).sum(-1)


def _cayley_a(p: Tensor, valid: Tensor, floor: bool) -> Tensor:
    r = 1 - p + 1e-8
    local = (1 - r) / (1 + r + 1e-8)
    low = 0.5 * p[valid].mean() if floor and valid.any() else torch.zeros((), dtype=p.dtype)
    return (low + (1 - low) * local).clamp(1e-3, 1.0)


SPECS = [
    "nll",
    "p",
    "tsallis(q=0.5)",
    "tsallis(q=0)",
    "tsallis(q=-0.3)",
    "GeneralFamily-2",
    "OnlyTopP-0.1",
    "OnlyBottomP-0.1",
    "OnlyTopLogP-0.1",
    "OnlyBottomLogP-0.1",
    "dft",
    "eaft",
    "eaft(power=2)",
    "eaft(entropy=exact)",
    "Cayley_Trans",
    "cayley(floor=data_parallel)",
    "cayley(floor=0)",
    "DEFT",
    "deft(eps=0)",
]


def formula(spec: str, logp: Tensor, probs: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token loss and keep, float64; `logp` carries the gradient, `probs` [N, V] does not."""
    p = logp.detach().exp()
    pg = logp.exp()
    every = torch.ones_like(valid)
    c = probs.square().sum(-1)
    vocab = probs.shape[-1]
    match spec:
        case "nll" | "tsallis(q=0)":
            return -logp, every
        case "p":
            return 1 - pg, every
        case "tsallis(q=0.5)":
            return (1 - (0.5 * logp).exp()) / 0.5, every
        case "tsallis(q=-0.3)":
            return (1 - (-0.3 * logp).exp()) / -0.3, every
        case "GeneralFamily-2":
            return (1 - pg * pg) / 2, every
        case "OnlyTopP-0.1":
            return 1 - pg, p >= 0.1
        case "OnlyBottomP-0.1":
            return 1 - pg, p <= 0.1
        case "OnlyTopLogP-0.1":
            return -logp, p >= 0.1
        case "OnlyBottomLogP-0.1":
            return -logp, p <= 0.1
        case "dft":
            return -p * logp, every
        case "eaft":
            return -(_top20_entropy(probs) / 3.0) * logp, every
        case "eaft(power=2)":
            return -((_top20_entropy(probs) / 3.0) ** 2) * logp, every
        case "eaft(entropy=exact)":
            return -(_entropy(probs) / math.log(max(vocab, 2))) * logp, every
        case "Cayley_Trans" | "cayley(floor=data_parallel)" | "cayley(floor=0)":
            a = _cayley_a(p, valid, floor="0)" not in spec)
            return (1 - (a * logp).exp()) / (a + 1e-8), every
        case "DEFT":
            return (1 - (c * logp).exp()) / (c + 1e-6), every
        case "deft(eps=0)":
            return (1 - (c * logp).exp()) / c, every
    raise AssertionError(spec)


def loss_and_grad(
    spec: str, logits: Tensor, labels: Tensor, vocab_size: int, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """logits [N, V_padded], labels [N] (-100: ignored), upstream [N] -> loss, grad, keep, stats."""
    leaf = logits.detach().double().requires_grad_(True)
    valid = labels != -100
    full = leaf[:, :vocab_size].log_softmax(-1)
    logp = full.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    probs = full.detach().exp()
    loss, keep = formula(spec, logp, probs, valid)
    keep = keep & valid
    loss = torch.where(keep, loss, torch.zeros_like(loss))
    total = (loss * upstream.double()).sum()
    (coeff,) = torch.autograd.grad(total, logp, retain_graph=True)
    total.backward()
    stats = {
        "logp": logp.detach(),
        "p": logp.detach().exp(),
        "collision": probs.square().sum(-1),
        "entropy": _entropy(probs),
        "coeff": -coeff,
    }
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, keep, stats
