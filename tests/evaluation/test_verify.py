r"""math-verify's verdicts on what golds and answers look like, and on what makes it hang."""

import sys

import pytest

from megatron_deft.errors import UserError
from megatron_deft.evaluation import verify as module
from megatron_deft.evaluation.answers import readings, tidy
from megatron_deft.evaluation.limited import Limits, Stopped
from megatron_deft.evaluation.verify import verify

pytest.importorskip("math_verify", reason="pip install 'megatron-deft[math]'")

# Gold, what the answer is given as, whether it is right.
BOXES = [
    ("204", "204", True),
    ("073", "73", True),
    ("73", r"\textbf{(073)}", True),
    ("5", "5.", True),
    ("5", "-5", False),
    ("1000", "1,000", True),
    ("12,345,678", "12345678", True),
    ("1000", r"1{,}000", True),
    ("12000", r"12\,000", True),
    ("0", "12 000", False),
    ("1,2", "12", False),
    ("1080", r"\$1,080", True),
    ("18.90", r"\$18.9", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac12", "1/2", True),
    ("0.333333", r"\frac{1}{3}", True),
    (r"\frac{1}{3}", "0.33", False),
    (r"1\frac{1}{2}", "1.5", True),
    ("50", r"50\%", True),
    ("0.5", r"50\%", True),
    ("50", r"60\%", False),
    ("4.5e33", r"4.5 \times 10^{33}", True),
    (r"4.5 \times 10^{33}", "4.5e33", True),
    ("4.5e33", r"4.5\cdot 10^{33} \mathrm{erg} / \mathrm{s}", True),
    ("4.5e33", r"L \approx 4.5e33 \text{ erg s}^{-1}", True),
    ("4.5e33", "4.6e33", False),
    ("6.02e23", "602e21", True),
    ("6.02e23", "602000000000000000000000", True),
    ("2.45e6", "2,450,000", True),
    ("6.6e-34", "6.6e-34", True),
    ("6.6e-34", "0.66e-33", True),
    ("6.6e-34", "1e-20", False),
    ("2e-9", "0.000000003", False),
    ("2e-9", "0.000000002", True),
    ("2e-9", r"x = 3e-9", False),
    ("2e-9", "0", False),
    ("0", "0.0", True),
    ("1.6", r"1.6 \text{ cm}", True),
    ("1.6", r"\approx 1.6\,\mathrm{cm}", True),
    ("41.8", r"41.8^{\circ}", True),
    (r"5.4 \text{ cents}", "5.4", True),
    ("5", r"x = 5", True),
    ("x=5", "5", True),
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("p - q", "-q + p", True),
    ("p - q", "q - p", False),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", True),
    ("(1,2)", "(2,1)", False),
    ("[1,2)", r"\left[1, 2\right)", True),
    ("[1,2)", "(1,2)", False),
    (r"(-\infty, 0) \cup (3, \infty)", r"(-\infty,0)\cup(3,\infty)", True),
    ("1,2,3", "3, 2, 1", True),
    (r"\{1,2\}", r"1 \text{ and } 2", True),
    ("1,2,3", "1,2", False),
    (r"\text{Evelyn}", "Evelyn", True),
    (r"\text{Evelyn}", r"\text{Angela}", False),
    (r"\text{(A)}", "A", True),
    (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        r"\begin{bmatrix}1&2\\3&4\end{bmatrix}",
        True,
    ),
    (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        r"\begin{pmatrix}1&2\\3&5\end{pmatrix}",
        False,
    ),
    ("np.arcsin(10/13)", r"\sin^{-1}\left(\frac{10}{13}\right)", True),
    ("-1./3", r"-\frac{1}{3}", True),
    (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", r"\frac{E_1 + 2 E_2}{3}", True),
    (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", r"\frac{2 E_1 + E_2}{3}", False),
    ("E_{1},E_{2}", "E_2, E_1", True),
    (r"\frac{10^{5} L_{\odot}}{M_{\odot}^{6}}", r"10^5 L_\odot M_\odot^{-6}", True),
    (r"m \left(\gamma^{2}-1\right)", r"m\gamma^2 - m", True),
    (r"\gamma + 1", "1", False),
    (r"\frac{1}{m} t", r"\frac{t}{m}", True),
    (r"\frac{1}{m} t", r"\frac{1}{m}", False),
    ("2t", "2", False),
    ("m^2 + c", "c + m^2", True),
    ("2", r"2 m", True),
    (r"x = 2,125", "2125", True),
    (r"1,080 \text{ dollars}", "1080", True),
    (r"\text{no}\ \frac{1}", r"\text{no}\ \frac{1}", True),  # not even LaTeX, and the same
]
OUTPUTS = [
    ("5", "", False),
    ("5", "I cannot tell.", False),
    ("5", "The answer is 5.", True),
    ("5", "The answer is $5$", True),
    ("5", "The answer is 6.", False),
    ("4.5e33", "The answer is 4.5e33", True),
    ("2", r"first $\boxed{1}$, and after a long deliberation about it $\boxed{2}$", True),
    ("1", r"first $\boxed{1}$, and after a long deliberation about it $\boxed{2}$", False),
    ("2", r"it is $\boxed{1}$ or $\boxed{2}$", True),
    ("1, 2", r"it is $\boxed{1}$ or $\boxed{2}$", True),
    ("1", r"it is $\boxed{1}$ or $\boxed{2}$", False),
    ("1, 2", r"it is $\boxed{1, 2}$", True),
    ("4", "28 days / 7 days/week = 4 weeks\n#### 4", True),
    ("28", "28 days / 7 days/week = 4 weeks\n#### 4", False),
    ("5", r"\[ x = \boxed{\frac{10}{2}}. \]", True),
    ("5", r"$x = \boxed 5$", True),
    ("np.arcsin(10/13)", r"The answer is $\arcsin(10/13)$.", True),
    (r"\frac{1}{3} E_{1}", r"The answer is $\frac{E_1}{3}$.", True),
]
HANGS = [
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{10^{10^{10}}}",
    r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}",
]
LATE = Stopped(late=True)


def test_verdicts() -> None:
    asked = [(gold, rf"so it is $\boxed{{{answer}}}$", right) for gold, answer, right in BOXES]
    asked += OUTPUTS
    found = verify([(tidy(gold), readings(output)) for gold, output, _ in asked], 2)
    wrong = [case for case, verdict in zip(asked, found, strict=True) if case[2] is not verdict]
    assert not wrong


@pytest.mark.parametrize("workers", [1, 2])
def test_what_hangs_is_stopped_and_the_others_are_judged(workers: int) -> None:
    outputs = [r"\boxed{x=5}", *HANGS, r"\boxed{4}"]
    found = verify([("5", readings(output)) for output in outputs], workers, Limits(0.5))
    assert found == [True, *[LATE] * len(HANGS), False]


def test_a_text_that_equals_the_gold_is_right_however_hard_the_algebra() -> None:
    gold = r"\int_0^1 \frac{\sin(x^{x})}{\ln(x+e^{x^2})} dx"
    assert verify([(tidy(gold), readings(rf"\boxed{{{gold}}}"))], 1, Limits(2.0)) == [True]


def test_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-deft\[math\]'"):
        verify([], 1)


def test_the_parser_that_flips_verdicts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "version", lambda name: "4.9.3")
    with pytest.raises(UserError, match=r"4\.9\.3.*pip install antlr4-python3-runtime==4\.13\.2"):
        verify([], 1)
