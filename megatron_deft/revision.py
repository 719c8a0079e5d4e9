"""Which sources this is: the commit of a checkout, else the version of the package."""

import os
import subprocess
from pathlib import Path

from megatron_deft import __version__

ROOT = Path(__file__).parents[1]


def _git(*arguments: str) -> str | None:
    # no lock on the index: a run must not be in the way of who works in the checkout
    command = ("git", "--no-optional-locks", "-C", str(ROOT), *arguments)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """The commit of the sources, "+dirty" when they differ from it.

    Outside a checkout (a plain copy on a GPU machine) what MEGATRON_DEFT_COMMIT says, else None.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None or _git("rev-parse", "--show-toplevel") != str(ROOT):
        return os.environ.get("MEGATRON_DEFT_COMMIT")
    return head if _git("status", "--porcelain") == "" else f"{head}+dirty"


def revision() -> str:
    """Version and commit, such as "0.1.0 (0123456789ab)"; the version alone outside a checkout."""
    found = commit()
    return f"{__version__} ({found})" if found else __version__
