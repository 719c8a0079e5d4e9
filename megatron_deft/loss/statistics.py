"""From the sums of vocabulary shards to what the objective says about every token.

`row_stats` reduces a slice of each row of logits to 5 floats, and k more for the top k. Here they
are put together, slice by slice and rank by rank, and the objective judges the tokens. All of it is
O(N) fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft.objectives import Objective, Statistics


@dataclass(frozen=True)
class TokenStatistics:
    """What a call of `token_loss` saw, detached, each of the labels' shape (see `Statistics`).

    loss, gate: fp32, the objective's; 0 where keep is false
    keep:       bool, the tokens that count: neither ignored nor dropped by the objective's
                threshold. A mean over tokens divides by their number.
    """

    loss: Tensor
    gate: Tensor
    keep: Tensor
    logp: Tensor
    p: Tensor
    collision: Tensor
    entropy: Tensor
    is_argmax: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Softmax:
    """Where N tokens' probabilities come from, [N] fp32: p_i = exp(z_i - row_max) / sum_exp.

    logp: of the labels
    """

    row_max: Tensor
    sum_exp: Tensor
    logp: Tensor

    def __getitem__(self, tokens: slice) -> Softmax:
        """Of some of the tokens."""
        return Softmax(self.row_max[tokens], self.sum_exp[tokens], self.logp[tokens])


@dataclass(frozen=True)
class Judged:
    """What an objective says of N tokens, [N] fp32, keep and is_argmax bool; and their softmax."""

    loss: Tensor
    gate: Tensor
    keep: Tensor
    p: Tensor
    collision: Tensor
    entropy: Tensor
    is_argmax: Tensor
    softmax: Softmax

    def outputs(self) -> tuple[Tensor, ...]:
        """In the order of `TokenStatistics`, whose last field is the caller's."""
        per_token = (self.loss, self.gate, self.keep, self.softmax.logp, self.p, self.collision)
        return (*per_token, self.entropy, self.is_argmax)


def all_gather(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[rows, N] on each rank -> [ranks, rows, N] on every rank, in rank order."""
    return start_all_gather(local, group, in_background=False)()


def start_all_gather(
    local: Tensor, group: dist.ProcessGroup | None, in_background: bool = True
) -> Callable[[], Tensor]:
    """Begin `all_gather`; calling what is returned waits for it and gives its result."""
    if group is None or dist.get_world_size(group) == 1:
        return lambda: local[None]
    ranks, (rows, tokens) = dist.get_world_size(group), local.shape
    local = local.contiguous()
    gathered = local.new_empty(ranks * rows, tokens)  # gloo wants the shards end to end
    work = dist.all_gather_into_tensor(gathered, local, group=group, async_op=in_background)

    def wait() -> Tensor:
        if in_background:
            work.wait()
        return gathered.view(ranks, rows, tokens)

    return wait


def combine(parts: Tensor) -> Tensor:
    """The sums of slices of a row [parts, 5 + k, N] -> those of all together [5 + k, N].

    m_r are the slices' maxima and M theirs; a slice's sums are brought from m_r to M by
    f = exp(m_r - M): S1 by f, S2 by f^2, and Sh = f (Sh_r + (m_r - M) S1_r). S1 - 1, which
    `row_stats` gives, keeps its digits: the 1 that is left out belongs to the slice of the maximum.
    """
    if parts.shape[0] == 1:
        return parts[0]
    part_max, rest, s2, sh, target = parts[:, :5].unbind(1)
    row_max, owner = part_max.max(0)
    shift = part_max - row_max
    # slices of -inf alone: the difference would be nan
    shift = shift.masked_fill(part_max == -torch.inf, -torch.inf)
    factor = shift.exp()
    # An empty or negligible slice has f = 0 and perhaps shift = -inf: its term is 0, not nan.
    sh = (factor * (sh + shift * (1.0 + rest))).masked_fill(factor == 0, 0.0).sum(0)
    rest = (factor * rest).sum(0) + factor.scatter(0, owner[None], 0.0).sum(0)
    s2 = (factor.square() * s2).sum(0)
    # one slice holds the target, the others 0
    sums = torch.stack([row_max, rest, s2, sh, target.sum(0)])
    if parts.shape[1] == 5:
        return sums
    k = parts.shape[1] - 5
    return torch.cat([sums, parts[:, 5:].flatten(0, 1).topk(k, dim=0).values])


def _topk_entropy(top: Tensor, valid: Tensor) -> Tensor:
    """Entropy in nats of softmax over the k largest logits [k, N], largest first -> [N].

    log1p of the others' sum, so that an entropy near 0 keeps its digits.
    """
    d = top[1:] - top[0]
    e = d.exp()
    others = e.sum(0)
    entropy = others.log1p() - (e * d).masked_fill(e == 0, 0.0).sum(0) / (1.0 + others)
    return entropy.masked_fill(~valid, 0.0)


def _batch_mean(p: Tensor, valid: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Mean of p over the valid tokens of all ranks of `group`; 0 when there is none."""
    total = torch.stack([p.sum(), valid.sum()])
    if group is not None:
        # every rank's tokens belong to the one batch whose mean the objective is defined on
        dist.all_reduce(total, group=group)
    return total[0] / total[1].clamp(min=1.0)


def judge(
    sums: Tensor,
    valid: Tensor,
    objective: Objective,
    vocab_size: int,
    batch_group: dist.ProcessGroup | None,
) -> Judged:
    """The objective's verdict on N tokens, from the sums of their rows over the whole vocabulary.

    sums:        [5 + k, N] fp32, see `ops.reference.row_stats`
    valid:       [N] bool, the label is not ignored
    batch_group: ranks whose tokens share the batch mean, for the objectives that have one
    """
    # each rank's zeros of an ignored row do not add up to zeros
    row_max, rest, s2, sh, target = sums[:5].masked_fill(~valid, 0.0)
    s1 = 1.0 + rest
    logp = target - row_max - rest.log1p()
    p = logp.exp().masked_fill(~valid, 0.0)
    statistics = Statistics(
        logp=logp,
        p=p,
        collision=s2 / s1.square(),
        entropy=rest.log1p() - sh / s1,
        is_argmax=(target >= row_max) & valid,
        valid=valid,
        topk_entropy=_topk_entropy(sums[5:], valid) if sums.shape[0] > 5 else None,
        mean_p=_batch_mean(p, valid, batch_group) if objective.batch_mean else None,
        vocab_size=vocab_size,
    )
    loss, gate, keep = objective(statistics)
    return Judged(
        loss, gate, keep, p, statistics.collision, statistics.entropy, statistics.is_argmax,
        Softmax(row_max, s1, logp),
    )  # fmt: skip
