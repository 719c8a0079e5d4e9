r"""The final answer of a worked solution: what stands in its last \boxed{...}."""

import re

_COMMANDS = (re.compile(r"\\boxed(?![A-Za-z])"), re.compile(r"\\fbox(?![A-Za-z])"))
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)  # a backslash takes the brace after it along
_END = re.compile(r"\$|\\\)|\\\]|\n")  # of an answer without braces: where its formula ends


def boxed_answer(solution: str) -> str | None:
    r"""The answer in the last \boxed of `solution`, or in the last \fbox when there is no \boxed.

    `\boxed{5}` and `\boxed 5` give "5"; braces nest, escaped ones (`\{`) do not count; of a box in
    a box the inner one is taken. Without braces the answer reaches to the end of the formula.

    None without a box, and when the last box is empty or its brace is never closed: an earlier box
    is then an intermediate result as likely as not, which is worse than no answer.
    """
    for command in _COMMANDS:
        found = [match.end() for match in command.finditer(solution)]
        if found:
            return _content(solution[found[-1] :].lstrip()) or None
    return None


def _content(text: str) -> str | None:
    if not text.startswith("{"):
        return _END.split(text, maxsplit=1)[0].strip().rstrip(".,")
    depth = 0
    for match in _BRACES.finditer(text):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return text[1 : match.start()].strip()
    return None
