"""How far from float64: never more than twice what the best same-dtype torch formula is."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_deft import ops, token_loss
from megatron_deft.loss.statistics import combine, judge
from megatron_deft.objectives import parse

FORMS = {
    "two passes": {},
    "two passes in place": {"inplace_backward": True},
    "single read": {"grad_in_forward": True},
    "single read in place": {"inplace_backward": True, "grad_in_forward": True},
}
ROWS = {
    "normal": lambda g: torch.randn(64, 5003, generator=g) * 3,
    "large": lambda g: torch.randn(64, 5003, generator=g) * 300,
    "far from zero": lambda g: torch.randn(64, 5003, generator=g) + 900,
    "nearly equal": lambda g: torch.randn(64, 5003, generator=g) * 1e-3,
    "one confident": lambda g: torch.randn(64, 5003, generator=g) + 20 * (torch.arange(5003) == 7),
}
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}  # half a unit


def error(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest value of its row, or of the vector."""
    scale = want.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return ((got.detach().double() - want).abs() / scale).max().item()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", list(EPS))
def test_statistics(dtype: torch.dtype, kind: str) -> None:
    logits = ROWS[kind](torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.arange(64)
    _, stats = token_loss(logits, labels, "nll", return_stats=True)
    results = []
    for z in (logits.float(), logits.double()):
        full = z.log_softmax(-1)
        p = full.exp()
        results.append(
            (full[torch.arange(64), labels], p.square().sum(-1), -torch.special.xlogy(p, p).sum(-1))
        )
    for name, torchs, want in zip(("logp", "collision", "entropy"), *results, strict=True):
        # of few sums in fp32, so that the last bit of the result itself is allowed
        allowed = 2 * max(error(torchs, want), EPS[torch.float32])
        assert error(getattr(stats, name), want) <= allowed, name


@pytest.mark.parametrize(
    ("dtype", "form"),
    [(d, f) for d in EPS for f in FORMS if d != torch.float16 or "two" in f],  # fp16: refused
)
@pytest.mark.parametrize("kind", ROWS)
def test_gradient(dtype: torch.dtype, kind: str, form: str) -> None:
    logits = ROWS[kind](torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.arange(64)
    exact = logits.double().requires_grad_(True)
    (want,) = torch.autograd.grad(F.cross_entropy(exact, labels, reduction="sum"), exact)
    plain = logits.clone().requires_grad_(True)
    loss = F.cross_entropy(plain.float(), labels, reduction="sum")
    (torchs,) = torch.autograd.grad(loss, plain)
    ours = logits.clone().requires_grad_(True)
    (got,) = torch.autograd.grad(token_loss(ours, labels, "nll", **FORMS[form]).sum(), ours)
    assert got.dtype == dtype
    assert error(got, want) <= 2 * max(error(torchs, want), EPS[dtype])


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("gap", [5.0, 10.0, 20.0, 40.0, 70.0])
def test_a_model_that_is_sure_keeps_its_digits(gap: float, world: int) -> None:
    """1 - p far below fp32's last digit of 1: log p, entropy and gradient stay right to 1e-5.

    torch's own formulas give 0, or noise, here: S1 in fp32 ends at 6e-8.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 5000, generator=generator)
    logits[:, 4321] = logits.amax(-1) + gap
    labels = torch.full((8,), 4321)
    d = logits.double() - logits[:, 4321:4322].double()
    e = d.exp().index_fill(1, torch.tensor(4321), 0.0)  # of the others: float64 ends at 1e-16, too
    logp = -e.sum(-1).log1p()
    want = logp, -logp - (e * d).sum(-1) / (1 + e.sum(-1))
    width = 5000 // world
    parts = [
        ops.row_stats(logits[:, r * width : (r + 1) * width], labels, r * width, width, -100)
        for r in range(world)
    ]
    valid = torch.ones(8, dtype=torch.bool)
    merged = judge(combine(torch.stack(parts)), valid, parse("nll"), 5000, None)
    for got, exact in zip((merged.softmax.logp, merged.entropy), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)
    for form in FORMS.values():
        leaf = logits.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(token_loss(leaf, labels, "nll", **form).sum(), leaf)
        torch.testing.assert_close(grad[:, 4321].double(), want[0].expm1(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", list(EPS))
def test_every_element_alone(dtype: torch.dtype) -> None:
    """Small probabilities keep their own relative precision, down to the least normal number."""
    logits = (torch.randn(8, 5003, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    labels = torch.full((8,), -1)  # no target: nothing but coeff * p
    stats = ops.row_stats(logits, labels, 0, 5003, -100)
    grad = ops.gate_grad(
        logits, labels, stats[0], 1 / (1 + stats[1]), stats[4], 0, 5003, -100, inplace=False
    )
    want = logits.double().softmax(-1)
    normal = want > torch.finfo(dtype).tiny
    relative = ((grad.double() - want).abs() / want)[normal].max().item()
    plain = logits.float().softmax(-1).to(dtype)
    torchs = ((plain.double() - want).abs() / want)[normal].max().item()
    assert relative <= 2 * max(torchs, EPS[dtype])
