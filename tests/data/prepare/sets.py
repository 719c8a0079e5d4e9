"""Rows and settings that the tests of prepared sets share."""

from pathlib import Path

from megatron_deft.data.prepare.tokenise import RowSettings
from tests.data.files import chat

TASK = 400  # bytes


ROWS = [chat(f"what is {n} plus {n}?", f"{2 * n} " * (n % 5 + 1)) for n in range(120)]


LONGEST = 45


DROP = RowSettings(max_length=LONGEST, truncation="drop")


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
