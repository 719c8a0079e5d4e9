"""Commands and measurements in processes of their own, so that none finds what another left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.revision import ROOT


def megatron_deft(*arguments: str | Path | int) -> float:
    """Run `megatron-deft ...`; wall seconds from the start of its process to its end.

    Errors: UserError with what the command said when it failed.
    """
    begin = time.perf_counter()
    _python("megatron_deft", *map(str, arguments))
    return time.perf_counter() - begin


def part(name: str, **arguments: Any) -> dict[str, Any]:
    """What the function of that name in `data_parts` returns, called in a process of its own.

    arguments: its own, as JSON holds them; paths become text.
    Errors: UserError with what it said when it failed.
    """
    given = json.dumps(arguments, default=str)
    printed = _python("megatron_deft.benchmarks.data_parts", name, given)
    return dict(json.loads(printed.splitlines()[-1]))


def _python(module: str, *arguments: str) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    if done.returncode:
        said = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise UserError(f"{module} {arguments[0]} failed: {said}")
    return done.stdout
