"""What is logged of a micro-batch, against the same sums made one token at a time in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_deft import token_loss
from megatron_deft.loss.metrics import METRICS
from megatron_deft.training.statistics import (
    HISTOGRAMS,
    LANDSCAPE_BINS,
    SUMS,
    landscape,
    means,
    sums_size,
    token_sums,
)

VOCAB = 50
P_BINS, ENTROPY_BINS = LANDSCAPE_BINS


def batch(seed: int, tokens: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """Logits from flat to sharp, labels with every tenth ignored, and weights."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, tokens, VOCAB, generator=generator)
    logits *= torch.rand(1, tokens, 1, generator=generator) * 8
    labels = torch.where(
        torch.rand(1, tokens, generator=generator) < 0.5,
        logits.argmax(-1),
        torch.randint(0, VOCAB, (1, tokens), generator=generator),
    )
    labels[:, ::10] = -100
    weights = torch.randint(1, 5, (1, tokens), generator=generator) / 4
    return logits, labels, weights


def gates(spec: str, p: float, collision: float) -> float:
    return {
        "nll": 1.0,
        "dft": p,
        "deft": collision / (collision + 1e-6) * p**collision,
        "onlytopp(t=0.3)": p,
        "tsallis(q=-0.5)": p**-0.5,
    }[spec]


def full(rows: list[list[float]]) -> list[list[float]]:
    """With the zeros at the end of each row, which are not logged."""
    assert all(not row or row[-1] != 0 for row in rows)
    return [[*row, *[0.0] * (ENTROPY_BINS - len(row))] for row in rows]


SPECS = ["nll", "dft", "deft", "onlytopp(t=0.3)", "tsallis(q=-0.5)"]


def sums(spec: str, part: tuple[Tensor, Tensor, Tensor], vocab: int | None = VOCAB) -> Tensor:
    logits, labels, weights = part
    loss, stats = token_loss(logits, labels, spec, vocab_size=VOCAB, return_stats=True)
    return token_sums(stats, (loss * weights).sum(), (weights * stats.keep).sum(), weights, vocab)


def by_hand(spec: str, part: tuple[Tensor, Tensor, Tensor]) -> dict[str, Any]:
    """Each token by itself in Python's floats; what it counts is its weight."""
    logits, labels, weights = part
    found: dict[str, Any] = {name: [0.0] * bins for name, bins in HISTOGRAMS.items()}
    found |= {key: [[0.0] * ENTROPY_BINS for _ in range(P_BINS)] for key in ("tokens", "pull")}
    found["weight"] = 0.0
    for row, label, weight in zip(logits[0], labels[0].tolist(), weights[0].tolist(), strict=True):
        if label < 0:
            continue
        probabilities = row.double().softmax(-1).tolist()
        p = probabilities[label]
        if spec.startswith("onlytopp") and p < 0.3:
            continue
        entropy = -sum(q * math.log(q) for q in probabilities if q)
        gate = gates(spec, p, sum(q * q for q in probabilities))
        share = entropy / math.log(VOCAB)
        for value, bins in ((p, P_BINS), (share, ENTROPY_BINS), (gate, HISTOGRAMS["gate"])):
            # a value on an edge between two bins could go either way in fp32
            edge = round(value * bins)
            assert not 0 < edge < bins or abs(value * bins - edge) > 1e-5
        i = min(int(p * P_BINS), P_BINS - 1)
        j = min(int(share * ENTROPY_BINS), ENTROPY_BINS - 1)
        found["weight"] += weight
        found["p"][i] += weight
        found["gate"][min(int(gate * HISTOGRAMS["gate"]), HISTOGRAMS["gate"] - 1)] += weight
        found["tokens"][i][j] += weight
        found["pull"][i][j] += weight * gate * (1 - p)
    return found


@pytest.mark.parametrize("spec", SPECS)
def test_every_sum_is_that_of_its_tokens(spec: str) -> None:
    part = batch(1)
    total, wanted = sums(spec, part), by_hand(spec, part)
    logged, weight = means(total), wanted["weight"]
    for name, bins in HISTOGRAMS.items():
        shares = [logged[f"{name}_histogram_{i}"] for i in range(bins)]
        assert shares == pytest.approx([count / weight for count in wanted[name]])
        assert sum(shares) == pytest.approx(1)
    found = landscape(total, VOCAB)
    assert (found["vocab_size"], found["entropy_bins"]) == (VOCAB, ENTROPY_BINS)
    assert full(found["tokens"]) == wanted["tokens"]  # quarters, exact in binary
    for row, expected in zip(full(found["gate_error"]), wanted["pull"], strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # the cells refine the histogram of p
    assert [sum(row) / weight for row in found["tokens"]] == pytest.approx(
        [logged[f"p_histogram_{i}"] for i in range(P_BINS)]
    )


def test_micro_batches_add_up() -> None:
    parts = [batch(seed) for seed in (1, 2, 3)]
    whole = tuple(torch.cat(values, 1) for values in zip(*parts, strict=True))
    assert len(whole) == 3
    added = sum(sums("deft", part) for part in parts)
    torch.testing.assert_close(added, sums("deft", whole), rtol=1e-6, atol=1e-6)


def test_without_a_landscape_nothing_more_is_summed() -> None:
    part = batch(4)
    short, long = sums("dft", part, None), sums("dft", part)
    assert (len(short), len(long)) == (sums_size(False), sums_size(True))
    assert len(short) == len(SUMS) + sum(HISTOGRAMS.values())
    assert torch.equal(long[: len(short)], short)
    assert means(long) == means(short)
    assert {"loss", "kept_tokens", *METRICS} < set(means(short))


def test_a_sure_token_keeps_its_small_gradient() -> None:
    """fp32's p is 1 there, and 1 - p would be 0."""
    logits = torch.zeros(1, 1, VOCAB)
    logits[..., 7] = 30.0
    part = (logits, torch.tensor([[7]]), torch.ones(1, 1))
    found = landscape(sums("nll", part), VOCAB)
    wanted = (VOCAB - 1) * math.exp(-30)
    assert found["tokens"][-1][0] == 1
    assert found["gate_error"][-1][0] == pytest.approx(wanted, rel=1e-3)


def test_what_is_not_finite_is_null_in_its_cell_alone() -> None:
    logits, labels, weights = batch(5)
    logits[0, 1, 0], labels[0, 1] = -math.inf, 0  # p = 0, where 1/p has no value
    found = landscape(sums("tsallis(q=-1)", (logits, labels, weights)), VOCAB)
    cells = [cell for row in found["gate_error"] for cell in row]
    assert cells.count(None) == 1
    assert None in found["gate_error"][0]
    assert all(cell >= 0 for cell in cells if cell is not None)


def test_no_kept_token_is_nan_not_zero() -> None:
    logits, labels, weights = batch(6)
    total = sums("nll", (logits, torch.full_like(labels, -100), weights))
    logged = means(total)
    assert logged["kept_tokens"] == 0
    assert all(math.isnan(value) for name, value in logged.items() if name != "kept_tokens")
    assert not any(map(any, landscape(total, VOCAB)["tokens"]))
