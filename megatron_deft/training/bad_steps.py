"""Steps whose loss or gradient is not finite: told, kept to be looked at, and not without end."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_deft.checkpoint_folder import step_name
from megatron_deft.data.batches import collate
from megatron_deft.data.mixture import Rows
from megatron_deft.data.sampler import Indices
from megatron_deft.errors import UserError
from megatron_deft.files import atomic_write

FOLDER = "bad_steps"
SHOWN = 8  # rows that a warning names; the file has all


def is_finite_loss(metrics: Mapping[str, float]) -> bool:
    """Whether there is nothing against the step's loss; the mean of no token at all is no fault."""
    return metrics["kept_tokens"] == 0 or math.isfinite(metrics["loss"])


class BadSteps:
    """Counts the skipped steps in a row, the same on every rank."""

    def __init__(self, run_dir: Path, limit: int) -> None:
        """limit: how many in a row are borne."""
        self.run_dir, self.limit = run_dir, limit
        self.in_a_row = 0
        self._last = ""

    def good(self) -> None:
        """The step was done."""
        self.in_a_row = 0

    def bad(self, step: int, metrics: Mapping[str, float], rows: Indices) -> str:
        """The step was skipped; a line for the log. rows: the step's global batch."""
        self.in_a_row += 1
        self._last = f"loss {metrics['loss']:g}, grad_norm {metrics['grad_norm']:g} at step {step}"
        named = ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")
        return (
            f"step {step} is skipped, weights and optimizer are as before: loss "
            f"{metrics['loss']:g}, grad_norm {metrics['grad_norm']:g}; {self.in_a_row} in a row, "
            f"{metrics['skipped']:g} in all; its rows ({named}) are in {self.file(step)}"
        )

    def file(self, step: int) -> Path:
        """Where the samples of a skipped step are."""
        return self.run_dir / FOLDER / f"{step_name(step)}.jsonl"

    def write(self, step: int, data: Rows, rows: Indices) -> None:
        """Write the samples of a skipped step; one rank does.

        A line per row of the global batch: {"row": 17, "documents": [{"tokens": [...], "labels":
        [...], "weights": [...]}]}, labels and their weights as the loss gets them: the token that
        follows, -100 and 0 where none is trained.
        """
        path = self.file(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as handle:
            for row in rows.tolist():
                handle.write(json.dumps({"row": row, "documents": _documents(data, row)}) + "\n")

    def stop_if_too_many(self, step: int) -> None:
        """Errors: UserError naming the samples, when more in a row were bad than are borne."""
        if self.in_a_row <= self.limit:
            return
        raise UserError(
            f"{self.in_a_row} steps in a row had a loss or gradient that is not finite "
            f"({self._last}), and train.max_skipped_steps={self.limit}; no checkpoint was saved "
            f"since. See the samples in {self.file(step)}, lower optim.lr, train in fp32, or go on "
            "from an earlier checkpoint"
        )


def _documents(data: Rows, row: int) -> list[dict[str, Any]]:
    batches = [
        collate([[document]], len(document.tokens) - 1, packed=False)
        for document in data.documents(row)
        if len(document.tokens) > 1
    ]
    return [
        {name: batch[name][0].tolist() for name in ("tokens", "labels", "weights")}
        for batch in batches
    ]
