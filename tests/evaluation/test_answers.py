"""The gold of each kind of field, and what an output may be read as."""

from typing import Any

import pytest

from megatron_deft.evaluation.answers import (
    Reading,
    boxed_gold,
    first_gold,
    hashed_gold,
    plain_gold,
    readings,
    tidy,
)


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        (" 204 ", "204"),
        (27.0, "27"),
        (27, "27"),
        (-0.5, "-0.5"),
        (3.6e-7, "3.6e-07"),
        ("", None),
        ("  ", None),
        (None, None),
        (True, None),
        (float("nan"), None),
        (["5"], None),
    ],
)
def test_plain(value: Any, gold: str | None) -> None:
    assert plain_gold(value) == gold


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        ("2 + 2 = <<2+2=4>>4\n#### 4", "4"),
        ("it costs\n#### 1,080", "1,080"),
        ("#### 1\nno:\n#### 2", "2"),
        ("18", "18"),
        (18.0, "18"),
        ("nothing\n#### ", None),
        (None, None),
    ],
)
def test_after_hashes(value: Any, gold: str | None) -> None:
    assert hashed_gold(value) == gold


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        (["$2$"], "2"),
        (["$x=1$, $y=2$", "3"], "x=1$, $y=2"),
        (["$1,3$", "5"], "1,3"),
        ([4.0], "4"),
        ([], None),
        (["$ $"], None),
        ([None], None),
        ("2", None),
    ],
)
def test_first_of_a_list(value: Any, gold: str | None) -> None:
    assert first_gold(value) == gold


def test_boxed() -> None:
    assert boxed_gold(r"first $\boxed{1}$, then $\boxed{\frac{1}{2}}$") == r"\frac{1}{2}"
    assert boxed_gold("no box") is None
    assert boxed_gold(5) is None


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (r"\$18.90", "18.90"),
        ("$5$ and $6$", "5 and 6"),
        ("1,\n 2", "1, 2"),
        ("4.5e33", r"4.5 \times 10^{33}"),
        ("-1E-07", r"-1 \times 10^{-7}"),
        (".5e+3 K", r".5 \times 10^{3} K"),
        ("3e8.", r"3 \times 10^{8}"),
        ("5.", "5"),
        ("5, ", "5"),
        ("5...", "5..."),
        (r"\left\{ x \right.", r"\left\{ x \right."),
        (r"1.6\,", "1.6"),
        (r"1.6 \; .", "1.6"),
        (r"5.4\text{ cents}~", r"5.4\text{ cents}"),
        (r"\approx 1.6", "1.6"),
        ("= 1.6", "1.6"),
        (r"x \approx 1.6", r"x \approx 1.6"),
        (r"\approxeq 2", r"\approxeq 2"),
        (r"\textbf{(073)}", "073"),
        (r"\mathrm{ 12 }", "12"),
        (r"\text{Evelyn}", r"\text{Evelyn}"),
        (r"\textbf{(A)}", r"\textbf{(A)}"),
        (r"12\,000", "12000"),
        ("x = 2,125", "x = 2125"),
        (r"11,\! 111,\! 100", "11111100"),
        ("1{,}234, 5,678", "1234, 5678"),
        ("1,200,3", "1,200,3"),
        ("1, 200", "1, 200"),
        ("(1,200)", "(1,200)"),
        (r"\{1,200\}", r"\{1,200\}"),
        (r"-1 234 567.5", "-1234567.5"),
        (r"2023 100", "2023 100"),
        (r"0.12 345", "0.12 345"),
        (r"1 & 200 & 300", r"1 & 200 & 300"),
        ("(1, 200)", "(1, 200)"),
        ("-1./3", "-1/3"),
        ("1.5/3", "1.5/3"),
        ("np.arcsin(10/13)", r"\arcsin(10/13)"),
        (r"\frac{1}{2} E_{1}", r"\frac{1}{2} \varpi_{1}"),
        ("e^{t}", "e^{t}"),
        ("SE_1", "SE_1"),
        (r"M_{\odot}^{6}", "M_{sun}^{6}"),
        (r"\gamma^{2}", r"\varsigma^{2}"),
        (r"\gammab", r"\gammab"),
        (r"\frac{1}{m} t", r"\frac{1}{m}{t}"),
        ("2t", "2{t}"),
        ("2 m", "2 m"),
        ("x - m", "x -{m}"),
        ("x - 2 m", "x - 2 m"),
        ("2e^3", "2e^3"),
        ("2e", "2e"),
        ("x2e3", "x2e3"),
        ("2e3x", "2e3x"),
        ("1.5e3.5", "1.5e3.5"),
    ],
)
def test_tidy(answer: str, text: str) -> None:
    assert tidy(answer) == text
    assert tidy(text) == text


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("", []),
        (" \n", []),
        (r"so $\boxed{5}$.", [("5", False)]),
        (r"so \boxed 5.", [("5", False)]),
        (r"\boxed{4.5e33}", [(r"4.5 \times 10^{33}", False)]),
        (r"\boxed{1} or \boxed{2}", [("2", False), (r"\boxed{1} or \boxed{2}", True)]),
        ("it is 5", [("it is 5", True)]),
        (r"the box \boxed{} is empty", [(r"the box \boxed{} is empty", True)]),
        ("$x = 2e3$ or 3e3", [(r"$x = 2 \times 10^{3}$ or $3 \times 10^{3}$", True)]),
        (
            r"\[ 1e2 \] $$1e3$$ \(1e4\)",
            [(r"\[ 1 \times 10^{2} \] $$1 \times 10^{3}$$ \(1 \times 10^{4}\)", True)],
        ),
    ],
)
def test_readings(output: str, found: list[tuple[str, bool]]) -> None:
    assert readings(output) == tuple(Reading(*reading) for reading in found)


def test_a_long_output_takes_no_time() -> None:
    text = r"\[ $$ \( $ 1e" * 20_000
    assert readings(text) == (Reading(text, True),)
