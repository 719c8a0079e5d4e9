"""What of a run's configuration may change when it is resumed, and what did."""

from collections.abc import Mapping
from typing import Any

# What may change when a run is resumed, beside train.*: how it is laid out, watched and saved.
FREE_KEYS = (
    "run_dir", "deterministic", "parallel", "lora", "loss", "monitor", "model.load", "model.hf",
    "optim.cpu_offload", "checkpoint", "data.show_sample", "data.workers", "data.prepare_workers",
)  # fmt: skip


def notes(name: str, manifest: Mapping[str, Any], now: Mapping[str, Any], data: Any) -> list[str]:
    """What is not as it was when the checkpoint of this name was saved, line by line.

    now: the whole configuration; data: the fingerprint of the training data and their packing
    """
    found = changes(manifest["config"], now)
    if manifest.get("data") != data:
        found.insert(
            0,
            f"the data, or how samples are packed, changed since {name} was saved: "
            "samples come in another order",
        )
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What of a run's configuration is not as it was when the checkpoint was saved, line by line.

    How a run is laid out, watched and saved may change freely; what it computes is named.
    """
    notes = []
    for key, value in now.items():
        name, old = prefix + key, before.get(key)
        if name in FREE_KEYS or (name.startswith("train.") and name != "train.global_batch"):
            continue
        if isinstance(value, Mapping):
            notes += changes(old or {}, value, f"{name}.")
        elif old != value:
            order = "; samples come in another order" if name in ("seed", "data.shuffle") else ""
            notes.append(f"{name} is {value} now and was {old}{order}")
    return notes
