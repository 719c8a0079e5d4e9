r"""The last \boxed of a solution, however it is written."""

import pytest

from megatron_deft.data.prepare.boxed import boxed_answer

CASES = {
    "plain": (r"so $x = \boxed{5}$.", "5"),
    "nested braces": (r"$\boxed{\frac{13}{6}}$", r"\frac{13}{6}"),
    "deeper": (r"$\boxed{\sqrt{\frac{1}{2^{10}}}}$ done", r"\sqrt{\frac{1}{2^{10}}}"),
    "a command inside": (r"\boxed{\text{A}}", r"\text{A}"),
    "the last of several": (r"first $\boxed{1}$, then $\boxed{2}$", "2"),
    "a box in a box": (r"$\boxed{\boxed{7}}$", "7"),
    "fbox": (r"$\fbox{3}$", "3"),
    "boxed before fbox": (r"$\boxed{4}$ and \fbox{other}", "4"),
    "without braces": (r"$\boxed 5$", "5"),
    "without braces or a space": (r"$\boxed5$", "5"),
    "without braces, a sentence": (r"thus \(\boxed \frac12\). It is so.", r"\frac12"),
    "without braces or a formula": ("hence \\boxed 5.\nThe end.", "5"),
    "a space before the brace": (r"$\boxed {12}$", "12"),
    "spaces inside": (r"$\boxed{ 12 }$", "12"),
    "escaped braces": (r"$\boxed{\{1, 2\}}$", r"\{1, 2\}"),
    "one escaped brace": (r"$\boxed{\left\{ x \right.}$", r"\left\{ x \right."),
    "a line break in it": (r"\boxed{a \\}", r"a \\"),
    "several lines": ("\\boxed{\n5\n}", "5"),
    "none": ("the answer is 5", None),
    "no text": ("", None),
    "never closed": (r"$\boxed{5$", None),
    "the last never closed": (r"$\boxed{4}$ so $\boxed{5$", None),
    "empty": (r"put it in \boxed{}", None),
    "at the end": (r"\boxed", None),
    "another command": (r"$\boxedanswer{5}$", None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_answer(name: str) -> None:
    solution, answer = CASES[name]
    assert boxed_answer(solution) == answer


def test_a_long_solution_takes_no_time() -> None:
    assert boxed_answer("\\boxed{" * 20_000 + "{" * 100_000) is None
