"""`megatron-deft bench convert`: speed and memory of import and export beside `cp` of the model."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from megatron_deft.benchmarks import machine, synthetic
from megatron_deft.benchmarks.budgets import Row
from megatron_deft.benchmarks.peers import version
from megatron_deft.benchmarks.report import budget_table, columns, save
from megatron_deft.errors import UserError
from megatron_deft.files import require_space
from megatron_deft.revision import ROOT, commit

log = logging.getLogger(__name__)

GIB = 2**30
OF_COPY = 0.5  # throughput that each direction has to reach, of the faster copy's
OVERHEAD = 64 * 2**20  # bytes on the disk beside two models: headers, metadata, folders
DROP = Path("/proc/sys/vm/drop_caches")
METHOD = (
    "One after the other on one disk, each in a process of its own, from its start to its end: "
    "`cp -r` and sync, `convert import --no-verify`, `convert export --no-verify`, `cp -r` and "
    "sync again. The throughput is the model's bytes over the seconds, the ratio that to the "
    "faster copy. Import writes checksums, export compares them, both flush to the disk. Peak "
    "memory is VmHWM of the process, everything included; `baseline` is that of a process which "
    "only imports what a conversion imports. What export wrote is compared with what was made, "
    "bit by bit."
)
# Runs a command and says how much memory it took. ru_maxrss was rejected: a child inherits its
# parent's.
CHILD = """
import re, sys
code = 0
if sys.argv[1:]:
    from megatron_deft.cli import main
    code = main(sys.argv[1:])
else:
    import torch
    import megatron_deft.convert.hf
    torch.cat([torch.empty(1, device="meta")])  # loads torch's rules of shapes, as planning does
status = open("/proc/self/status").read()
print("\\npeak", int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
sys.exit(code)
"""


class Measured(NamedTuple):
    """One process: wall time in seconds, peak resident memory in bytes where it is ours."""

    seconds: float
    peak: int | None


def budget_bytes(largest: int) -> int:
    """Resident memory that a conversion may take, from the bytes of its largest tensor."""
    return 2 * largest + GIB


def run(args: Namespace) -> int:
    """Measure, print the table, write the JSON. Returns 1 when export wrote something else."""
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json {args.json}: is a folder; name a file in it")
    root, size = Path(args.dir), synthetic.model_bytes(args.shape)
    if not root.is_dir():
        raise UserError(f"--dir {root}: no such folder; name one on the disk to be measured")
    require_space(root / "bench-convert", 2 * size + OVERHEAD)
    report = _header(args, size)
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=root) as work:
        rows = _measure(Path(work), args.shape, _left_alone if args.warm else _forget, report)
    report["load"]["after"] = os.getloadavg()[0]
    best = min(row.seconds for name, row in rows.items() if name.startswith("cp"))
    report["rows"] = [_row(name, row, size, best) for name, row in rows.items()]
    report["budgets"] = judge(report["rows"], report["model"])
    print(_table(report["rows"]), end="\n\n")
    print(f"page caches between them: {report['caches']}", end="\n\n")
    print(budget_table(report["budgets"]))
    save(args.json, report)
    if args.json:
        print(f"\n{args.json}: everything measured")
    if report["different"]:
        log.error("WRONG: export changed %s", ", ".join(report["different"][:5]))
    unmet = args.strict and not all(line["met"] for line in report["budgets"])
    return 1 if report["different"] or unmet else 0


def _header(args: Namespace, size: int) -> dict[str, Any]:
    return {
        "benchmark": "convert",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine.machine("cpu"),
        "versions": machine.versions()
        | {package: version(package) for package in ("transformers", "safetensors")},
        "method": METHOD,
        "priority": os.nice(0),
        "load": {"before": os.getloadavg()[0]},  # of the last minute, in processes
        "model": {
            "shape": args.shape,
            "dtype": "bf16",
            "bytes": size,
            "tensors": len(synthetic.shapes(args.shape)),
            "largest_tensor_bytes": synthetic.largest_bytes(args.shape),
        },
    }


def _measure(
    work: Path, shape: str, forget: Callable[[Path], str], report: dict[str, Any]
) -> dict[str, Measured]:
    """Every row by name; at most two models are on the disk at a time."""
    source, weights, again = work / "source", work / "weights", work / "again"
    rows = {"baseline": convert()}
    log.info("making %s, %.1f GB", source, report["model"]["bytes"] / 1e9)
    synthetic.make(source, shape)
    report["caches"] = forget(work)
    rows["cp"] = _copy(source, work / "copy")
    forget(work)
    log.info("import")
    rows["import"] = convert("import", source, weights, "--no-verify")
    shutil.rmtree(source)
    forget(work)
    log.info("export")
    rows["export"] = convert("export", weights, again, "--no-verify")
    shutil.rmtree(weights)
    forget(work)
    rows["cp again"] = _copy(again, work / "copy")
    log.info("comparing with what was made")
    report["different"] = synthetic.different(again, shape)
    return rows


def _copy(source: Path, target: Path) -> Measured:
    log.info("cp")
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return Measured(seconds, None)


def convert(*arguments: str | Path) -> Measured:
    """`megatron-deft convert ...` in a process of its own; without arguments only its imports.

    Errors: UserError with what the process said when it failed.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", CHILD, *(["convert", *map(str, arguments)] * bool(arguments))]
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"convert {arguments[0]} failed: {done.stderr.strip()}")
    return Measured(seconds, int(done.stdout.rpartition(" ")[2]))


def _forget(folder: Path) -> str:
    """Make the next process read from the disk; returns how."""
    os.sync()
    try:
        DROP.write_text("3\n")
    except OSError:
        for path in filter(Path.is_file, folder.rglob("*")):
            with open(path, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "those of the model's files dropped (posix_fadvise)"
    return "dropped (/proc/sys/vm/drop_caches)"


def _left_alone(folder: Path) -> str:
    return "left alone"


def _row(name: str, row: Measured, size: int, best: float) -> Row:
    moved = name != "baseline"
    return {
        "name": name,
        "seconds": row.seconds,
        "gigabytes_per_second": size / row.seconds / 1e9 if moved else None,
        "share_of_copy": best / row.seconds if moved else None,
        "peak_bytes": row.peak,
    }


def judge(rows: Sequence[Row], model: Mapping[str, Any]) -> list[Row]:
    """The budgets of the report's "model": each direction's throughput and memory.

    Memory is in GiB, of the whole process with its interpreter and torch.
    """
    allowed = budget_bytes(model["largest_tensor_bytes"]) / GIB
    lines = []
    for row in rows:
        if row["name"] in ("import", "export"):
            share, peak = row["share_of_copy"], row["peak_bytes"] / GIB
            where = "2 x largest tensor + 1 GiB"
            if model["shape"] != "tiny":  # whose copy takes less than Python's start
                lines.append(_line(f"{row['name']}: share of cp", "", OF_COPY, share, True))
            lines.append(_line(f"{row['name']}: peak memory, GiB", where, allowed, peak, False))
    return lines


def _line(name: str, where: str, required: float, measured: float, at_least: bool) -> Row:
    return {
        "name": name,
        "where": where,
        "required": f"{'>=' if at_least else '<='} {required:.3g}",
        "measured": measured,
        "met": measured >= required if at_least else measured <= required,
    }


def _table(rows: Sequence[Row]) -> str:
    cells = [
        (
            row["name"],
            f"{row['seconds']:.1f}",
            _shown(row["gigabytes_per_second"], "{:.3f}"),
            _shown(row["share_of_copy"], "{:.0%}"),
            _shown(row["peak_bytes"] and row["peak_bytes"] / GIB, "{:.2f}"),
        )
        for row in rows
    ]
    return columns(("", "seconds", "GB/s", "of cp", "peak GiB"), cells, right=True)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
