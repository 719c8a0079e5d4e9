"""The kernels' plain twin: the same signatures in ordinary torch, for any device.

Used where the compiled extension has no kernel for a device, and by the tests as the second of
three witnesses (kernel, this twin, float64 oracle). It allocates fp32 copies of the logits.
"""

import torch
from torch import Tensor


def row_stats(
    logits: Tensor, labels: Tensor, vocab_start: int, vocab_valid: int, ignore_index: int
) -> Tensor:
    """Reduce each row of a vocabulary shard to five numbers.

    logits:      [..., V_local] fp32/bf16/fp16; columns >= vocab_valid are padding and are ignored
    labels:      [...] int64, global vocabulary indices or ignore_index
    vocab_start: global index of the shard's first column
    vocab_valid: number of real columns in this shard, 0 <= vocab_valid <= V_local
    returns:     [5, N] fp32 with m = max z, S1 = sum e, S2 = sum e^2, Sh = sum e (z - m), where
                 e = exp(z - m), and z_y (0 where another shard owns the target). An empty shard
                 gives m = -inf and zeros, an ignored row zeros.
    """
    labels = labels.reshape(-1)
    z = logits.reshape(labels.numel(), -1)[:, :vocab_valid].float()
    if vocab_valid == 0:
        out = z.new_zeros(5, labels.numel())
        out[0] = -torch.inf
    else:
        m = z.amax(dim=-1)
        # a shard of -inf alone has m = -inf, where the difference would be nan
        d = (z - m[:, None]).masked_fill(z == -torch.inf, -torch.inf)
        e = d.exp()
        column = labels - vocab_start
        owned = (column >= 0) & (column < vocab_valid)
        z_y = z.gather(1, column.clamp(0, vocab_valid - 1)[:, None])[:, 0].masked_fill(~owned, 0.0)
        # e = 0 comes with z - m = -inf: that product is 0, not nan.
        out = torch.stack(
            [m, e.sum(-1), e.square().sum(-1), (e * d).masked_fill(e == 0, 0.0).sum(-1), z_y]
        )
    return out.masked_fill(labels == ignore_index, 0.0)


def row_topk(logits: Tensor, labels: Tensor, k: int, vocab_valid: int, ignore_index: int) -> Tensor:
    """The k largest logits of each row of a shard, largest first.

    Same arguments as `row_stats`. Returns [k, N] fp32; -inf where the shard has fewer than k real
    columns, 0 in ignored rows.
    """
    labels = labels.reshape(-1)
    z = logits.reshape(labels.numel(), -1)[:, :vocab_valid]
    top = z.float().topk(min(k, vocab_valid), dim=-1).values.t()
    out = torch.nn.functional.pad(top, (0, 0, 0, k - top.shape[0]), value=-torch.inf)
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
    z = logits.reshape(labels.numel(), -1)
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
