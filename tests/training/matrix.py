"""Objectives by layouts: which combinations there are, and the README's table of those trained."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tests.training.layouts import (
    CP2,
    EP2,
    EP4,
    ETP1,
    FIRST,
    GATHER,
    MTP,
    PACKED,
    PLAIN,
    PP2,
    SEQUENCE,
    TP2,
    VPP2,
    Keys,
)

RANKS = 4
OBJECTIVES = ("nll", "dft", "eaft", "tsallis(q=0.5)", "cayley", "deft")
PATHS: dict[str, Keys] = {
    "logits": {"loss.fused_linear": "false"},
    "fused_linear": {"loss.fused_linear": "true", "loss.chunk_tokens": 24},
}
STEPS = 2


class Layout(NamedTuple):
    """A row: a model of tests/training/layouts.py on RANKS processes; the rest is data parallel."""

    model: str
    keys: Keys

    @property
    def whole(self) -> Keys:
        """What of it one process has too."""
        return {key: value for key, value in self.keys.items() if key in (*PACKED, *MTP)}


LAYOUTS: dict[str, Layout] = {
    "data 4": Layout("dense", {}),
    "data 4, optimizer not distributed": Layout("dense", PLAIN),
    "data 4, reduction and gather overlapped": Layout("dense", GATHER),
    "tensor 2": Layout("dense", TP2),
    "tensor 2, sequence": Layout("dense", SEQUENCE),
    "tensor 2 x pipeline 2": Layout("dense", TP2 | PP2),
    "pipeline 2 (3 + 1 layers)": Layout("dense", PP2 | {FIRST: 3}),
    "pipeline 2, virtual 2": Layout("dense", VPP2),
    "context 2": Layout("dense", CP2),
    "context 2 x tensor 2, sequence": Layout("dense", CP2 | SEQUENCE),
    "context 2 x pipeline 2": Layout("dense", CP2 | PP2),
    "packed rows, tensor 2 x pipeline 2": Layout("dense", PACKED | TP2 | PP2),
    "experts 4": Layout("experts", EP4),
    "experts 2 x tensor 2, sequence": Layout("experts", EP2 | SEQUENCE),
    "experts 4 on tensor 2, each whole": Layout("experts", EP4 | ETP1),
    "experts 2 x pipeline 2, virtual 2": Layout("experts", EP2 | VPP2),
    "2 prediction heads, tensor 2 x pipeline 2": Layout("dense", MTP | TP2 | PP2),
    "2 prediction heads, context 2": Layout("dense", MTP | CP2),
}
Cell = tuple[str, str, str]  # layout, objective, path
CELLS: tuple[Cell, ...] = tuple((n, o, p) for n in LAYOUTS for o in OBJECTIVES for p in PATHS)


def some() -> tuple[Cell, ...]:
    """One cell of each layout; together every objective on every path."""
    columns = len(OBJECTIVES) * len(PATHS)
    return tuple(CELLS[row * columns + row % columns] for row in range(len(LAYOUTS)))


def markdown(recorded: Mapping[str, Any]) -> str:
    """The README's table of what a run of all cells recorded.

    recorded["cells"]: by layout, objective and path "equal", or the error that refuses it
    """
    notes: list[str] = []
    lines = ["| | " + " | ".join(f"`{name}`" for name in OBJECTIVES) + " |"]
    lines.append("|---" * (len(OBJECTIVES) + 1) + "|")
    for layout, row in recorded["cells"].items():
        cells = []
        for objective in OBJECTIVES:
            reasons = [f"{path}: {how}" for path, how in row[objective].items() if how != "equal"]
            notes += [reason for reason in reasons if reason not in notes]
            marks = ["✓"] * (len(reasons) < len(PATHS))
            cells.append(", ".join(marks + [f"[{notes.index(reason) + 1}]" for reason in reasons]))
        lines.append(f"| {layout} | " + " | ".join(cells) + " |")
    lines += [""] * bool(notes) + [f"[{i + 1}] {note}" for i, note in enumerate(notes)]
    machine, commit = recorded["machine"], recorded["commit"]
    where = f"{machine['cores']} cores of an {machine['cpu']}, commit {commit}"
    return "\n".join([*lines, "", f"`make matrix`: {len(CELLS)} runs on {where}."])
