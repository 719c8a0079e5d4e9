"""What the tests of `fused_linear_loss` share: cases, the head in float64, the error allowed.

The head is differentiated by hand, in float64: softcap and product, down from what tests/oracle.py
says about the logits. What is allowed is measured, not guessed: the same-dtype logits path in plain
torch makes an error against float64, and ours may be twice that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_deft import fused_linear_loss
from tests.oracle import formula, loss_and_grad

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
THRESHOLD = (0.05, 0.2)  # no target's probability lies between: 0.1 is where tokens are dropped


@dataclass(frozen=True)
class Case:
    """A head and what goes through it.

    upstream: what the loss of each token is multiplied by
    whole:    the case that this one keeps some tokens of
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    upstream: Tensor
    vocab: int
    softcap: float | None = None
    whole: Case | None = None


class Result(NamedTuple):
    """Losses of tokens and the gradients, None where there is none."""

    loss: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def make(
    dtype: torch.dtype = torch.float32,
    *,
    tokens: int = 23,
    width: int = 37,
    vocab: int = 123,
    padded: int = 128,
    bias: bool = False,
    softcap: float | None = None,
    seed: int = 0,
) -> Case:
    """Logits of standard deviation 3, a fifth of the labels ignored, some targets the likeliest.

    Rows of the weight beyond the vocabulary hold inf and nan.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = (torch.randn(padded, width, generator=generator) * 3 / math.sqrt(width)).to(dtype)
    bias_of = torch.randn(padded, generator=generator).to(dtype) if bias else None
    logits = _logits(hidden.double(), weight.double()[:vocab], bias_of, softcap)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::3] = logits.argmax(-1)[::3]
    p = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
    near = (p > THRESHOLD[0]) & (p < THRESHOLD[1])
    labels[near] = logits.argmin(-1)[near]
    labels[1::5] = -100
    for tensor in (weight, bias_of):
        if tensor is not None:
            tensor[vocab::2], tensor[vocab + 1 :: 2] = math.inf, math.nan
    upstream = torch.rand(tokens, generator=generator) + 0.5
    return Case(hidden, weight, bias_of, labels, upstream, vocab, softcap)


def _logits(h: Tensor, w: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = F.linear(h, w, None if bias is None else bias[: w.shape[0]].to(w.dtype))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def exact(spec: str, case: Case) -> Result:
    """In float64: the chain rule from the logits down, written out."""
    h, w = case.hidden.double(), case.weight.double()[: case.vocab]
    z = _logits(h, w, case.bias, case.softcap)
    loss, dz, *_ = loss_and_grad(spec, z, case.labels, case.vocab, case.upstream)
    if case.softcap is not None:
        dz = dz * (1 - (z / case.softcap).square())
    pad = case.weight.shape[0] - case.vocab
    return Result(loss, dz @ w, F.pad(dz.t() @ h, (0, 0, 0, pad)), F.pad(dz.sum(0), (0, pad)))


def plain(spec: str, case: Case) -> Result:
    """The logits path in torch, product and gradients in the case's dtype, softmax in fp32."""
    h, w = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
    b = None if case.bias is None else case.bias.clone().requires_grad_()
    logp = _logits(h, w[: case.vocab], b, case.softcap).float().log_softmax(-1)
    valid = case.labels != -100
    chosen = logp.gather(1, case.labels.clamp(min=0)[:, None])[:, 0]
    loss, keep = formula(spec, chosen, logp.detach().exp(), valid)
    loss = torch.where(keep & valid, loss, torch.zeros_like(loss))
    (loss * case.upstream).sum().backward()
    return Result(loss.detach(), h.grad, w.grad, None if b is None else b.grad)


def fused(spec: str, case: Case, **options: Any) -> Result:
    """Ours: the tokens' weights as upstream with reduction="none", as token_weight otherwise."""
    h, w = (t.detach().clone().requires_grad_() for t in (case.hidden, case.weight))
    b = None if case.bias is None else case.bias.detach().clone().requires_grad_()
    if options.get("reduction") != "none":
        options["token_weight"] = case.upstream
    loss, stats = fused_linear_loss(
        h, w, case.labels, spec, vocab_size=case.vocab, bias=b, softcap=case.softcap, **options
    )
    (loss * case.upstream if options.get("reduction") == "none" else loss).sum().backward()
    return Result(stats.loss, h.grad, w.grad, None if b is None else b.grad)


def error(got: Tensor, want: Tensor) -> float:
    """The largest error of each row relative to its largest value; their root mean square.

    A maximum over rows would compare two draws of one unlucky row, where p is near 1.
    """
    rows = (got.double() - want).abs().amax(-1) / want.abs().amax(-1).clamp(min=1e-30)
    return rows.square().mean().sqrt().item() if want.numel() else 0.0


def allowed(spec: str, case: Case) -> dict[str, float]:
    """Twice torch's error, or half a unit of the dtype, for each part of a `Result`.

    Where few tokens are kept the error on all of them counts, too: of one, it is one draw.
    """
    cases = [case] if case.whole is None else [case, case.whole]
    pairs = [(plain(spec, c)._asdict(), exact(spec, c)._asdict()) for c in cases]
    return {
        name: 2 * max(HALF_UNIT[case.hidden.dtype], *(error(t[name], w[name]) for t, w in pairs))
        for name in Result._fields
        if name != "bias" or case.bias is not None
    }


def check_case(case: Case, got: Result, want: Result, most: dict[str, float]) -> None:
    """All of `got` within what is `allowed`, and 0 where it must be."""
    for name, ours in got._asdict().items():
        if ours is not None:
            assert ours.dtype == (torch.float32 if name == "loss" else case.hidden.dtype)
            found = error(ours, getattr(want, name))
            assert found <= most[name], (name, found, most[name])
    assert got.hidden is None or bool((got.hidden[case.labels == -100] == 0).all())
    for grad in (got.weight, got.bias):
        assert grad is None or bool((grad[case.vocab :] == 0).all())


def check(spec: str, case: Case, got: Result) -> None:
    """`check_case` against what is computed here."""
    check_case(case, got, exact(spec, case), allowed(spec, case))


def only(case: Case, kept: list[int]) -> Case:
    """With the labels of the other tokens ignored."""
    labels = torch.full_like(case.labels, -100)
    labels[kept] = case.labels.clamp(min=0)[kept]
    return replace(case, labels=labels, whole=case)


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """What torch.empty hands out holds nan: whoever reads it before writing it is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
