import math
import subprocess
import sys

import pytest
import torch

from megatron_deft.errors import UserError
from megatron_deft.objectives import OBJECTIVES, Statistics, describe, parse


def statistics(logp: torch.Tensor, collision: float = 0.3, vocab_size: int = 100) -> Statistics:
    return Statistics(
        logp=logp,
        p=logp.exp(),
        collision=torch.full_like(logp, collision),
        entropy=torch.full_like(logp, 1.0),
        is_argmax=torch.zeros_like(logp, dtype=torch.bool),
        valid=torch.ones_like(logp, dtype=torch.bool),
        topk_entropy=torch.full_like(logp, 0.9),
        mean_p=torch.tensor(0.4, dtype=logp.dtype),
        vocab_size=vocab_size,
    )


DEFAULTS = [f"{name}(0.5)" if name in ("tsallis", "onlytopp", "onlybottomp", "onlytoplogp",
            "onlybottomlogp") else name for name in OBJECTIVES]  # fmt: skip


@pytest.mark.parametrize("spec", DEFAULTS)
def test_gate_is_minus_the_derivative_of_the_loss_by_logp(spec: str) -> None:
    """With every statistic but logp held fixed, by finite differences in float64."""
    logp = torch.tensor([-0.01, -0.5, -2.0, -7.0], dtype=torch.float64)
    h = 1e-6
    base = statistics(logp)
    objective = parse(spec)
    # p too: dft's weight and cayley's a are made of it and are constants of the derivative
    shifted = [objective(Statistics(**{**vars(base), "logp": logp + d}))[0] for d in (-h, h)]
    _, gate, keep = objective(base)
    slope = (shifted[1] - shifted[0]) / (2 * h)
    torch.testing.assert_close(gate[keep], -slope[keep], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("original", "nll"),
        ("LOGP", "nll"),
        ("sft", "nll"),
        ("GeneralFamily-0.5", "tsallis(q=0.5)"),
        ("GeneralFamily--1", "tsallis(q=-1)"),
        ("tsallis(0.25)", "tsallis(q=0.25)"),
        ("Tsallis( q = 3 )", "tsallis(q=3)"),
        ("OnlyTopP-0.1", "onlytopp(t=0.1)"),
        ("OnlyBottomLogP-1", "onlybottomlogp(t=1)"),
        ("Cayley_Trans", "cayley(floor=micro_batch, eps=1e-08)"),
        ("cayley(floor=0)", "cayley(floor=0, eps=1e-08)"),
        ("DEFT", "deft(eps=1e-06)"),
        ("deft(eps=0)", "deft(eps=0)"),
        ("eaft(entropy=exact, power=2)", "eaft(power=2, entropy=exact)"),
    ],
)
def test_released_spellings(spelling: str, canonical: str) -> None:
    assert parse(spelling).spec == canonical
    assert parse(canonical) == parse(spelling)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("deaft", "legal are"),
        ("", "legal are"),
        ("tsallis", "needs q"),
        ("tsallis(q=nan)", "finite"),
        ("tsallis(q=inf)", "finite"),
        ("tsallis(q=abc)", "finite"),
        ("onlytopp-1", "0 <= t < 1"),
        ("onlybottomp-0", "0 < t <= 1"),
        ("deft(alpha=1)", "deft takes eps"),
        ("deft(eps=1, eps=2)", "given twice"),
        ("deft(eps=-1)", ">= 0"),
        ("nll(q=1)", "no parameter"),
        ("cayley(floor=global)", "micro_batch or data_parallel or 0"),
        ("eaft(power=0)", "> 0"),
    ],
)
def test_a_bad_spec_names_what_is_legal(spec: str, named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        parse(spec)
    assert "\n" not in str(caught.value)


def test_q_to_zero_is_nll_without_cancellation() -> None:
    logp = torch.tensor([-1e-3, -1.0, -11.0])
    for q in (1e-6, 1e-12, -1e-12, 1e-29, 1e-31, 1e-50):
        loss, gate, _ = parse(f"tsallis({q})")(statistics(logp))
        torch.testing.assert_close(loss, -logp, rtol=2e-5, atol=0)
        torch.testing.assert_close(gate, torch.ones(3), rtol=2e-5, atol=0)


def test_deft_eps_zero_takes_the_limit_and_the_released_eps_costs_13_percent() -> None:
    logp = torch.tensor([-12.0, -math.inf])
    loss, gate, _ = parse("deft(eps=0)")(statistics(logp, collision=0.0))
    assert torch.equal(loss, -logp)
    assert torch.equal(gate, torch.ones(2))
    near = statistics(torch.tensor([-math.log(151936.0)]), collision=1 / 151936)
    ratio = parse("deft")(near)[1] / parse("deft(eps=0)")(near)[1]
    assert 0.86 < ratio.item() < 0.88


@pytest.mark.parametrize("spec", ["dft", "eaft(entropy=exact)", "p", "deft", "cayley"])
def test_an_impossible_target_never_gives_nan(spec: str) -> None:
    base = statistics(torch.tensor([-math.inf]))
    loss, gate, _ = parse(spec)(base)
    assert not loss.isnan().any()
    assert not gate.isnan().any()


def test_p_and_dft_share_the_gradient_and_differ_in_value() -> None:
    base = statistics(torch.tensor([-0.1, -1.0, -3.0]))
    loss_p, gate_p, _ = parse("p")(base)
    loss_dft, gate_dft, _ = parse("dft")(base)
    torch.testing.assert_close(gate_p, gate_dft, rtol=1e-6, atol=0)
    assert not torch.allclose(loss_p, loss_dft)


def test_the_table_lists_every_objective_and_alias() -> None:
    table = describe()
    for name, row in OBJECTIVES.items():
        assert name in table
        assert row.source in table
        assert all(alias in table for alias in row.aliases)


def test_objectives_do_not_import_torch() -> None:
    code = (
        "import sys, megatron_deft.objectives as o; o.parse('deft'); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
