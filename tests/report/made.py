"""Runs and results made up for the tests, with numbers that can be told by hand."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

CONFIG = {
    "objective": "deft",
    "run_dir": "anywhere",
    "model": {"load": "weights/tiny", "dtype": "fp32"},
    "data": {"train_sets": ["data/a", "data/b"], "pack": True},
    "optim": {"lr": 1e-5, "warmup_steps": None},
    "train": {"steps": 40},
}


def histogram(name: str, bins: int, peak: int) -> dict[str, float]:
    """Half of the tokens in one bin, the rest spread evenly."""
    rest = 0.5 / (bins - 1)
    return {f"{name}_histogram_{i}": 0.5 if i == peak else rest for i in range(bins)}


def landscape(shift: int = 0) -> dict[str, Any]:
    """4 x 5 bins; two cells hold tokens."""
    tokens: list[list[float]] = [[] for _ in range(4)]
    pull: list[list[float]] = [[] for _ in range(4)]
    tokens[0], pull[0] = [0.0, 0.0, 0.0, 6.0], [0.0, 0.0, 0.0, 3.0]
    tokens[3 - shift], pull[3 - shift] = [2.0], [0.5]
    return {"vocab_size": 100, "entropy_bins": 5, "tokens": tokens, "gate_error": pull}


def record(step: int, steps: int = 40, factor: float = 1.0) -> dict[str, Any]:
    done = step / steps
    line = {
        "step": step,
        "loss": factor * math.exp(-done),
        "kept_tokens": 100.0,
        "ce": 3 * math.exp(-done),
        "p": 0.2 + 0.5 * done,
        "gate": factor * (0.3 + 0.4 * done),
        "entropy": 2.0 - done,
        "accuracy": 0.4 + 0.3 * done,
        "grad_norm": 1.0 + (step % 7) / 10,
        "lr": 1e-5 * (1 - done),
        "tokens": 128,
        **histogram("gate", 10, 3),
        **histogram("p", 20, int(19 * done)),
    }
    if step % 10 == 0:
        line |= {"val_loss": 1.0 - done / 2, "val_ce": 2.5 - done}
    if step in (1, steps):
        line["landscape"] = landscape(int(step == steps))
    return line


def without_new(line: dict[str, Any]) -> dict[str, Any]:
    """What versions logged that had neither histograms of p nor landscapes."""
    return {k: v for k, v in line.items() if not k.startswith(("p_", "landscape"))}


def write_run(folder: Path, lines: list[dict[str, Any]] | None = None, **changed: Any) -> Path:
    """A run folder; `changed` are sections or keys of its configuration, None for no file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [record(step) for step in range(1, 41)] if lines is None else lines
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if changed != {"config": None}:
        (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **changed}))
    return folder


def interval(mean: float, half: float = 0.05) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def results(models: list[str], sets: tuple[str, ...] = (), samples: int = 1) -> dict[str, Any]:
    """As `evaluate` writes it: the first model is the base, each next is 10% better."""
    keys = ["exact"] if samples == 1 else [f"avg@{samples}"]
    keys += [f"pass@{k}" for k in range(1, samples + 1)] if samples > 1 else []

    def scores(place: int, lift: float) -> dict[str, Any]:
        found = {}
        for i, key in enumerate(keys):
            found[key] = interval(0.2 + 0.1 * place + lift + 0.01 * i)
            if place:
                found[key]["delta"] = interval(0.1 * place, 0.15)
        return found

    content: dict[str, Any] = {
        "task": "math",
        "title": "Competition maths",
        "data": {"path": "data/math", "samples": 30},
        "settings": {"temperature": 1.0, "samples": samples},
        "models": {},
    }
    for place, name in enumerate(models):
        content["models"][name] = {"path": f"hf/{name}", "scores": scores(place, 0.0)}
        if sets:
            content["models"][name]["sets"] = {
                one: scores(place, 0.05 * i) for i, one in enumerate(sets)
            }
    return content


def write_results(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path
