"""The kernels' plain twin: the same signatures in ordinary torch, for any device.

Used where the compiled extension has no kernel for a device, and by the tests as the second of
three witnesses (kernel, this twin, float64 oracle). It allocates fp32 copies of the logits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def row_stats(
    logits: Tensor,
    labels: Tensor,
    vocab_start: int,
    vocab_valid: int,
    ignore_index: int,
    topk: int = 0,
) -> Tensor:
    """Reduce each row of a vocabulary shard to five numbers and its `topk` largest logits.

    logits:      [..., V_local] fp32/bf16/fp16; columns >= vocab_valid are padding and are ignored
    labels:      [...] int64, global vocabulary indices or ignore_index
    vocab_start: global index of the shard's first column
    vocab_valid: number of real columns in this shard, 0 <= vocab_valid <= V_local
    topk:        0 to 32
    returns:     [5 + topk, N] fp32 with m = max z, S1 - 1, S2 = sum e^2, Sh = sum e (z - m), where
                 e = exp(z - m) and S1 = sum e, and z_y (0 where another shard owns the target);
                 then the largest logits, largest first, -inf where the shard has fewer real
                 columns. An empty shard gives m = -inf, S1 - 1 = -1 and zeros, an ignored row
                 zeros.

    S1 - 1 is summed without one largest element, whose e is 1: where the model is sure of a token,
    it is far below the last digit of S1, and log p, entropy and the target's gradient hang on it.
    """
    labels = labels.reshape(-1)
    z = logits.reshape(labels.numel(), logits.shape[-1])[:, :vocab_valid].float()
    if vocab_valid == 0:
        out = z.new_zeros(5, labels.numel())
        out[0], out[1] = -torch.inf, -1.0
    else:
        m, largest = z.max(dim=-1)
        # a shard of -inf alone has m = -inf, where the difference would be nan
        d = (z - m[:, None]).masked_fill(z == -torch.inf, -torch.inf)
        e = d.exp()
        column = labels - vocab_start
        owned = (column >= 0) & (column < vocab_valid)
        z_y = z.gather(1, column.clamp(0, vocab_valid - 1)[:, None])[:, 0].masked_fill(~owned, 0.0)
        # e = 0 comes with z - m = -inf: that product is 0, not nan.
        sh = (e * d).masked_fill(e == 0, 0.0).sum(-1)
        s2 = e.square().sum(-1)
        # where all are -inf, even the largest e is 0; a nan stays one
        rest = e.scatter(1, largest[:, None], 0.0).sum(-1) + (0.0 * s2 - (m == -torch.inf).float())
        out = torch.stack([m, rest, s2, sh, z_y])
    if topk:
        top = z.topk(min(topk, vocab_valid), dim=-1).values.t()
        top = torch.nn.functional.pad(top, (0, 0, 0, topk - top.shape[0]), value=-torch.inf)
        out = torch.cat([out, top])
    return out.masked_fill(labels == ignore_index, 0.0)


def gate_grad(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    scale: Tensor,
    target_grad: Tensor,
    vocab_start: int,
    vocab_valid: int,
    ignore_index: int,
) -> Tensor:
    """The gradient of a gated objective with respect to one shard of the logits.

    logits, labels, vocab_start, vocab_valid, ignore_index: as in `row_stats`
    row_max:     [N] fp32, the maximum over the whole vocabulary
    scale:       [N] fp32, coeff / S1, so that scale * exp(z - row_max) = coeff * p
    target_grad: [N] fp32, coeff * expm1(logp), the target's entry without the cancellation of p - 1
    returns:     like logits, coeff * (p_i - 1[i = y]); 0 in padded columns and ignored rows

    Passing the maximum and 1/S1 apart, not their log-sum-exp, keeps p exact when logits are large:
    a log-sum-exp near 1000 is rounded to 6e-5.
    """
    shape = logits.shape
    labels = labels.reshape(-1)
    z = logits.reshape(labels.numel(), logits.shape[-1])
    grad = (z.float() - row_max[:, None]).exp_().mul_(scale[:, None])
    column = labels - vocab_start
    owned = (column >= 0) & (column < vocab_valid)
    rows = owned.nonzero()[:, 0]
    grad[rows, column[rows]] = target_grad[rows]
    grad[:, vocab_valid:] = 0.0
    # where, not a product: an ignored row may hold inf or nan.
    grad.masked_fill_((labels == ignore_index)[:, None], 0.0)
    return grad.to(logits.dtype).reshape(shape)


def gate_grad_(
    logits: Tensor,
    labels: Tensor,
    row_max: Tensor,
    scale: Tensor,
    target_grad: Tensor,
    vocab_start: int,
    vocab_valid: int,
    ignore_index: int,
) -> None:
    """`gate_grad` written over the logits themselves."""
    logits.copy_(
        gate_grad(
            logits, labels, row_max, scale, target_grad, vocab_start, vocab_valid, ignore_index
        )
    )


def _topk_entropy(top: Tensor) -> Tensor:
    """Entropy in nats of softmax over the k largest logits [k, N], largest first -> [N]."""
    d = top[1:] - top[0]
    e = d.exp()
    others = e.sum(0)
    return others.log1p() - (e * d).masked_fill(e == 0, 0.0).sum(0) / (1.0 + others)


def _gate(numbers: Sequence[float], stats: Tensor) -> Tensor:
    """The gate of each row [N] from its statistics [5 + topk, N] (see `objectives.Gate`)."""
    exponent_of, exponent, eps, low, high, entropy_power, entropy_scale, _ = numbers
    m, rest, s2, sh, z_y = stats[:5]
    s1 = 1.0 + rest
    logp = z_y - m - rest.log1p()
    p = logp.exp()
    cayley = ((p - 1e-8) / (2.0 + 2e-8 - p)).clamp(1e-3, 1.0)
    a = (torch.full_like(p, exponent), s2 / s1.square(), cayley)[int(exponent_of)]
    gate = (a * logp).exp().masked_fill(a == 0, 1.0)
    if eps > 0:
        gate = gate * (a / (a + eps))
    if entropy_power > 0:
        entropy = _topk_entropy(stats[5:]) if stats.shape[0] > 5 else rest.log1p() - sh / s1
        gate = gate * (entropy.clamp(min=0.0) / entropy_scale) ** entropy_power
    return gate.masked_fill((p < low) | (p > high), 0.0)


def row_stats_grad(
    logits: Tensor,
    labels: Tensor,
    gate: Sequence[float],
    vocab_valid: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Statistics and gradient of rows that hold the whole vocabulary, for an upstream of 1.

    logits, labels, vocab_valid, ignore_index: as in `row_stats`
    gate:    the eight numbers of `objectives.Gate`
    returns: (`row_stats` with the gate's topk, `gate_grad` with coeff = the gate)
    """
    stats = row_stats(logits, labels, 0, vocab_valid, ignore_index, int(gate[7]))
    logp = stats[4] - stats[0] - stats[1].log1p()
    coeff = _gate(gate, stats)
    grad = gate_grad(
        logits,
        labels,
        stats[0],
        coeff / (1.0 + stats[1]),
        coeff * logp.expm1(),
        0,
        vocab_valid,
        ignore_index,
    )
    return stats, grad


def row_stats_grad_(
    logits: Tensor,
    labels: Tensor,
    gate: Sequence[float],
    vocab_valid: int,
    ignore_index: int,
) -> Tensor:
    """`row_stats_grad` with the gradient written over the logits; returns the statistics."""
    stats, grad = row_stats_grad(logits, labels, gate, vocab_valid, ignore_index)
    logits.copy_(grad)
    return stats


def scale_rows_(grad: Tensor, labels: Tensor, factor: Tensor, ignore_index: int) -> None:
    """Multiply each row of `grad` [..., V] by its factor [N] fp32; ignored rows stay as they are.

    A factor of 0 gives zeros, whatever the row holds.
    """
    factor = factor.masked_fill(labels.reshape(-1) == ignore_index, 1.0)
    factor = factor.reshape(*grad.shape[:-1], 1)
    grad.copy_((grad.float() * factor).masked_fill(factor == 0, 0.0))
