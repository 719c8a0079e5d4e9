"""`megatron-deft bench train`: whole optimizer steps beside those of others on the same model."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from megatron_deft.benchmarks import machine
from megatron_deft.benchmarks.arguments import REPETITIONS, TRAIN_PLANS, TrainPlan, train_plan
from megatron_deft.benchmarks.budgets import Row
from megatron_deft.benchmarks.data_parts import write_even
from megatron_deft.benchmarks.peers import version
from megatron_deft.benchmarks.report import columns, number, save
from megatron_deft.benchmarks.shared import conclude
from megatron_deft.benchmarks.timing import summary
from megatron_deft.benchmarks.train_contenders import CONTENDERS, WHAT
from megatron_deft.data.tiny import make_tiny_llama
from megatron_deft.errors import UserError
from megatron_deft.revision import ROOT, commit

log = logging.getLogger(__name__)

WARM_UP = 2  # steps that are not timed
OVERS = ("core", "hf-deft")
ROUNDING = {"fp32": 1e-4, "bf16": 2e-2}  # relative, between the losses of the first step
METHOD = (
    "A process for each contender, of which one at a time runs one optimizer step: data, forward "
    "and backward of all micro-batches, clipping, AdamW, and what the trainer logs. Each "
    "repetition runs every contender once, in an order of its own; median and interquartile range "
    f"over repetitions, after {WARM_UP} steps that are not timed. A random Llama, the same for "
    "all; samples of equal length in the same order, of which a fraction of the tokens is not "
    "trained. The losses of the first step were compared: DEFT's with one another, and "
    "megatron-core's cross-entropy with the one that is logged beside DEFT. bf16: megatron-core "
    "with bf16 weights and fp32 main ones, Hugging Face with fp32 weights under autocast. "
    "peak_bytes: of the process with everything in it (VmHWM), on CUDA of torch's allocator."
)


def run(args: Namespace) -> int:
    """Measure, print the table, write the JSON. Returns 1 when losses differ."""
    plan, repetitions, threads = _settings(args)
    names = _chosen(args.only)
    report = _header(args, plan, threads, repetitions)
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        settings = _make(Path(folder), plan, threads, WARM_UP + repetitions)
        log.info("%s: starting %s", plan.title, ", ".join(names))
        seconds, found = _measure(Path(folder), settings, names, repetitions)
    report["wrong"] = wrong_losses(found, plan.dtype)
    report["rows"] = rows_of(seconds, found)
    report["budgets"] = judge(report["rows"], plan, threads)
    report["load"]["after"] = os.getloadavg()[0]
    report["complete"] = set(names) == set(CONTENDERS)
    print(_table(plan, report["rows"]), end="\n\n")
    save(args.json, report)
    return conclude(report, args, "WRONG")


def _settings(args: Namespace) -> tuple[TrainPlan, int, int]:
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json {args.json}: is a folder; name a file in it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    repetitions = REPETITIONS[device] if args.repetitions is None else args.repetitions
    threads = torch.get_num_threads() if args.threads is None else args.threads
    for name, value in (("--repetitions", repetitions), ("--threads", threads)):
        if value < 1:
            raise UserError(f"{name} {value}: expected at least 1")
    return train_plan(device, args.shape, args.dtype), repetitions, threads


def _chosen(only: str | None) -> list[str]:
    names = only.split(",") if only else list(CONTENDERS)
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise UserError(f"--only {unknown[0]}: legal are {', '.join(CONTENDERS)}")
    return names


def _header(args: Namespace, plan: TrainPlan, threads: int, repetitions: int) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "benchmark": "train",
        "complete": False,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine.machine(device) | {"threads": threads},
        "versions": machine.versions() | {"transformers": version("transformers")},
        "operators": machine.operators(device),
        "method": METHOD,
        "load": {"before": os.getloadavg()[0]},  # of the last minute, in processes
        "arguments": {
            "only": args.only,
            "device": device,
            "plan": plan._asdict(),
            "repetitions": repetitions,
        },
    }


def _make(work: Path, plan: TrainPlan, threads: int, steps: int) -> dict[str, Any]:
    """Model, data and settings of all contenders."""
    model = make_tiny_llama(
        work / "model",
        ["a few words"],
        vocab_size=300,
        embeddings=plan.vocabulary,
        hidden_size=plan.hidden,
        layers=plan.layers,
        heads=plan.hidden // 64 or 1,
        kv_heads=max(1, plan.hidden // 256),
        max_positions=plan.length + 1,  # the last is only a label
    )
    samples = plan.batch * steps
    write_even(str(work / "data"), str(model), samples, plan.length, plan.ignored)
    (work / "empty.yaml").write_text("{}\n")
    return {
        "work": str(work),
        "model": str(model),
        "data": str(work / "data"),
        "objective": "deft",
        "lr": 1e-4,
        "steps": steps,
        "threads": threads,
        **plan._asdict(),
    }


class _Process:
    """A contender at work."""

    def __init__(self, name: str, settings: Path) -> None:
        self.name = name
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # Two processes must not spin while they wait for a third, as OpenMP's threads would.
        environment = os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
        self._said = open(settings.parent / f"{name}.log", "w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_deft.benchmarks.train_contenders", name, settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=environment,
        )

    def read(self) -> dict[str, Any]:
        """Its next line. Errors: UserError with what it said when it has none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            said = " | ".join(self._said.read().strip().splitlines()[-3:])
            raise UserError(f"bench train: {self.name} failed: {said}")
        return dict(json.loads(line))

    def step(self) -> dict[str, Any]:
        """What it says of one more step."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.read()

    def end(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


@contextmanager
def _processes(names: Sequence[str], settings: Path) -> Iterator[list[_Process]]:
    started: list[_Process] = []
    try:
        for name in names:
            started.append(_Process(name, settings))
        yield started
    finally:
        for process in started:
            process.end()


def _measure(
    work: Path, settings: Mapping[str, Any], names: Sequence[str], repetitions: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of each contender's timed steps; and what it said of its start and first step."""
    file = work / "settings.json"
    file.write_text(json.dumps(settings))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, dict[str, Any]] = {}
    with _processes(names, file) as contenders:
        for one in contenders:
            ready = one.read()
            found[one.name] = ready | one.step()
            for _ in range(WARM_UP - 1):
                one.step()
        log.info("%d x %d timed steps", repetitions, len(contenders))
        for repetition in range(repetitions):
            for one in random.Random(repetition).sample(contenders, len(contenders)):
                step = one.step()
                seconds[one.name].append(step["seconds"])
                found[one.name]["peak_bytes"] = step["peak_bytes"]
    return seconds, found


def wrong_losses(found: Mapping[str, Mapping[str, Any]], dtype: str) -> list[str]:
    """Whose first step had another loss than DEFT's, or than the cross-entropy logged with it."""
    wrong = []
    reference = found.get("deft", {})
    for name, one in found.items():
        for key in ("loss", "ce"):
            if key in one and key in reference:
                off = abs(one[key] - reference[key]) / abs(reference[key])
                if not off <= ROUNDING[dtype]:
                    wrong.append(f"{name}: {key} {one[key]:g}, deft has {reference[key]:g}")
    return wrong


def rows_of(
    seconds: Mapping[str, list[float]], found: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """A row for each contender, with its time over those that were measured beside it."""
    times = {name: summary(values) for name, values in seconds.items()}
    return [
        {
            "name": name,
            "what": WHAT[name],
            "path": found[name]["path"],
            **time._asdict(),
            "seconds": seconds[name],
            "tokens_per_second": found[name]["tokens"] / time.median_ms * 1e3,
            "time_over": {
                other: time.median_ms / times[other].median_ms if other in times else None
                for other in OVERS
            },
            "peak_bytes": found[name]["peak_bytes"],
        }
        for name, time in times.items()
    ]


def judge(rows: Sequence[Row], plan: TrainPlan, threads: int) -> list[Row]:
    """DEFT's step is to take no longer than megatron-core's own; at the plans it is set for."""
    named = {row["name"]: row for row in rows}
    set_for = plan in TRAIN_PLANS.values() and (plan != TRAIN_PLANS["cpu"] or threads == 2)
    if not set_for or "deft" not in named:
        return []
    measured = named["deft"]["time_over"]["core"]
    return [
        {
            "name": "deft: step over megatron-core's own cross-entropy",
            "where": plan.title,
            "required": "<= 1",
            "measured": measured,
            "met": None if measured is None else measured <= 1.0,
        }
    ]


def _table(plan: TrainPlan, rows: Sequence[Row]) -> str:
    cells = [
        (
            row["name"],
            number(row["median_ms"], "{:.1f}"),
            number(row["iqr_ms"], "{:.1f}"),
            *(number(row["time_over"][name], "{:.2f}") for name in OVERS),
            number(row["tokens_per_second"], "{:.0f}"),
            number(row["peak_bytes"] / 1e6, "{:.0f}"),
        )
        for row in rows
    ]
    header = ("contender", "ms", "iqr", *(f"x {name}" for name in OVERS), "tokens/s", "peak MB")
    return f"{plan.title}\n{columns(header, cells, right=True)}"


def markdown(report: Mapping[str, Any]) -> str:
    """The README's table."""
    plan = TrainPlan(**report["arguments"]["plan"])
    head = [
        plan.title,
        "what",
        "ms a step",
        "of `core`'s",
        "of `hf-deft`'s",
        "tokens/s",
        "peak, MB",
    ]
    lines = [head, ["---"] * len(head)]
    for row in report["rows"]:
        over = (number(row["time_over"][name], "{:.2f}") for name in OVERS)
        lines.append(
            [
                f"`{row['name']}`",
                row["what"],
                f"{row['median_ms']:.0f} ± {row['iqr_ms']:.0f}",
                *over,
                f"{row['tokens_per_second']:.0f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
