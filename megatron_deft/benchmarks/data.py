"""`megatron-deft bench data`: tokenising, waiting for data, opening a large set, packing.

Every measurement is made in a process of its own, of real files on the disk. What they compute is
checked, and what is wrong ends the run with 1.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_deft.benchmarks import machine, tokenising
from megatron_deft.benchmarks.budgets import Row
from megatron_deft.benchmarks.peers import version
from megatron_deft.benchmarks.processes import megatron_deft, part
from megatron_deft.benchmarks.report import budget_table, columns, save
from megatron_deft.benchmarks.tokenising import Case, learn
from megatron_deft.errors import UserError
from megatron_deft.files import require_space
from megatron_deft.processes import available_cores
from megatron_deft.revision import commit

log = logging.getLogger(__name__)

LENGTH = 2048  # positions of a packed row
OPENED_BATCH = 256  # samples of the first global batch
LEFT_OUT = 3  # steps, the first ones: what starts up is no part of the loader's pace
LOADERS = [(micro, workers) for micro in (1, 4) for workers in (0, 1)]
_BYTES = {"row": 25_000, "sample": 90}  # on the disk, of all files there are at a time
_SECTIONS = ("tokenising", "loader", "opening", "packing")
METHOD = (
    "Tokenising: `prepare chat` on all cores beside the tokenizer's encode_batch on the same texts "
    "in memory, in turn; seconds without those of starting (the same command on a row for each "
    "worker); ratios are medians of the repetitions'. Loader: `train` of a tiny Llama on packed "
    "FigFont, data_seconds over step_seconds of metrics.jsonl without the first steps. Opening: a "
    "new process, after its imports; `from the disk` with the files' pages dropped from the cache; "
    "memory is the peak's growth of VmHWM, `own` that of RssAnon. Packing: filled positions over "
    "all positions."
)


def run(args: Namespace) -> int:
    """Measure, print the tables, write the JSON. Returns 1 when something came out wrong."""
    _check(args)
    report = _header(args)
    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=args.dir) as folder:
        work = Path(folder)
        log.info("making data and tokenizers")
        cases = tokenising.make_cases(work, args.rows)
        figfont = cases[-1]
        math = _math_case(work, args.math)
        log.info("tokenising")
        report["tokenising"] = tokenising.measure(work, cases, args.repetitions)
        packed = {case.name: _prepare(work, case) for case in (figfont, math) if case}
        log.info("training")
        report["loader"] = [
            _train(work, packed[figfont.name], figfont.tokenizer, args.steps, *which)
            for which in LOADERS
        ]
        log.info("opening %d samples", args.samples)
        report["opening"] = _open(work, figfont.tokenizer, args.samples)
        log.info("packing")
        report["packing"] = [
            {"name": name.partition(",")[0]} | part("pack_set", path=path, capacity=LENGTH)
            for name, path in packed.items()
        ]
        if math is None:
            report["packing"].append({"name": "math", "status": "no file given: --math FILE"})
    report["load"]["after"] = os.getloadavg()[0]
    report["budgets"] = judge(report)
    print(_tables(report))
    print(budget_table(report["budgets"]))
    save(args.json, report)
    if args.json:
        print(f"\n{args.json}: everything measured")
    return verdict(report, args.strict)


def verdict(report: Mapping[str, Any], strict: bool) -> int:
    """The exit code: 1 when something came out wrong, or `strict` and a budget is not met."""
    wrong = [f"{part}, {row['name']}" for part in _SECTIONS for row in report[part]
             if row.get("wrong")]  # fmt: skip
    if wrong:
        log.error("WRONG: %s", "; ".join(wrong))
    unmet = strict and any(line["met"] is False for line in report["budgets"])
    return 1 if wrong or unmet else 0


def _check(args: Namespace) -> None:
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json {args.json}: is a folder; name a file in it")
    if not Path(args.dir).is_dir():
        raise UserError(f"--dir {args.dir}: no such folder; name one on the disk to be measured")
    smallest = {
        "rows": available_cores(), "samples": OPENED_BATCH, "steps": LEFT_OUT + 1, "repetitions": 1
    }  # fmt: skip
    for name, least in smallest.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: at least {least} is needed")
    for file in args.math or ():
        if not Path(file).is_file():
            raise UserError(f"--math {file}: no such file")
    size = args.rows * _BYTES["row"] + args.samples * _BYTES["sample"]
    require_space(Path(args.dir) / "bench-data", size)


def _header(args: Namespace) -> dict[str, Any]:
    return {
        "benchmark": "data",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine.machine("cpu"),
        "versions": machine.versions()
        | {name: version(name) for name in ("transformers", "tokenizers", "numpy", "pyarrow")},
        "method": METHOD,
        "priority": os.nice(0),
        "load": {"before": os.getloadavg()[0]},  # of the last minute, in processes
    }


def _math_case(work: Path, files: Sequence[str] | None) -> Case | None:
    if not files:
        return None
    megatron_deft("prepare", "math", work / "math", "--source", *files, "--val-size", 1)
    file = work / "math" / "train.parquet"
    learn(work / "math-bpe", file, "extra_info")
    return Case("math", file, "extra_info", work / "math-bpe")


def _prepare(work: Path, case: Case) -> Path:
    out = work / f"set-{case.tokenizer.name}"
    megatron_deft(
        "prepare", "chat", out, case.file, "--tokenizer", case.tokenizer, "--format", case.form,
        "--max-length", LENGTH,
    )  # fmt: skip
    return out


def _train(work: Path, data: Path, model: Path, steps: int, micro: int, workers: int) -> Row:
    """Real training of the tiny Llama; how much of its steps is waiting for data."""
    run_dir = work / f"run-{micro}-{workers}"
    config = {
        "run_dir": str(run_dir),
        "model": {"hf": str(model), "dtype": "fp32"},
        "data": {
            "train_sets": [str(data)], "max_length": LENGTH, "pack": True, "workers": workers,
            "show_sample": False,
        },
        "train": {
            "steps": steps, "global_batch": micro, "micro_batch": micro, "save_at_end": False
        },
        "monitor": {"tensorboard": False},
    }  # fmt: skip
    file = work / "run.yaml"
    file.write_text(json.dumps(config))  # which is YAML too
    megatron_deft("train", file)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return loader_row(lines, steps) | {"micro_batch": micro, "workers": workers}


def loader_row(lines: Sequence[Mapping[str, Any]], steps: int) -> Row:
    """What metrics.jsonl tells of waiting, the first LEFT_OUT steps left out."""
    kept = lines[LEFT_OUT:]
    waited, whole = (sum(line[f"{what}_seconds"] for line in kept) for what in ("data", "step"))
    losses = [line["loss"] for line in lines]
    return {
        "name": "train",
        "steps": len(kept),
        "step_seconds": whole / len(kept),
        "data_seconds": waited / len(kept),
        "share": waited / whole,
        "longest_share": max(line["data_seconds"] / line["step_seconds"] for line in kept),
        "tokens_per_step": sum(line["tokens"] for line in kept) / len(kept),
        "wrong": int(len(lines) != steps or None in losses),
    }


def _open(work: Path, tokenizer: Path, samples: int) -> list[Row]:
    out = work / "synthetic"
    part("write_synthetic", out=out, tokenizer=tokenizer, samples=samples)
    return [
        {"name": f"{'packed' if packed else 'not packed'}, from the {'disk' if cold else 'cache'}"}
        | part(
            "open_synthetic", path=out, tokenizer=tokenizer, length=LENGTH, packed=packed,
            cold=cold, batch=OPENED_BATCH if not packed else 1,
        )
        for packed in (False, True) for cold in (False, True)
    ]  # fmt: skip


def judge(report: Mapping[str, Any]) -> list[Row]:
    """The budgets of the report's sections; a set that was not packed is not measured."""
    lines = [
        _line("tokenising: share of encode_batch's rate", row["name"], ">=", 0.9, row["ratio"])
        for row in report["tokenising"]
    ]
    for row in report["loader"]:
        where = f"micro_batch {row['micro_batch']}, data.workers {row['workers']}"
        lines.append(_line("training: share of time waiting", where, "<", 0.02, row["share"]))
    for row in report["opening"][:2]:  # packing has no budget
        where = f"{row['samples']:,} samples, {row['name']}"
        megabytes = row["peak_grown_bytes"] / 1e6
        lines.append(_line("open and first batch, seconds", where, "<", 2, row["seconds"]))
        lines.append(_line("open and first batch, MB", where, "<", 300, megabytes))
    for row in report["packing"]:
        where = f"{row['samples']:,} samples" if "samples" in row else row["status"]
        name = f"packing at {LENGTH}: {row['name']}, efficiency"
        lines.append(_line(name, where, ">=", 0.97, row.get("efficiency")))
    return lines


def _line(name: str, where: str, sign: str, required: float, measured: float | None) -> Row:
    met = None
    if measured is not None:
        met = measured >= required if sign == ">=" else measured < required
    return {
        "name": name,
        "where": where,
        "required": f"{sign} {required:g}",
        "measured": measured,
        "met": met,
    }


def _tables(report: Mapping[str, Any]) -> str:
    tokenised = [
        (
            row["name"],
            f"{row['rows']}",
            f"{row['tokens_per_row']:.0f}",
            _shown(row["rows_per_second"], "{:.0f}"),
            _shown(row["tokens_per_second"], "{:.3g}"),
            f"{row['tokens_per_second_encode_batch']:.3g}",
            _shown(row["ratio"], "{:.3f}"),
            _shown(row["ratio_fast"], "{:.3f}"),
            f"{row['ratio_command']:.3f}",
        )
        for row in report["tokenising"]
    ]
    header = (
        "tokenising", "rows", "tokens/row", "rows/s", "tokens/s", "encode_batch", "ratio",
        "to _fast", "whole command",
    )  # fmt: skip
    waiting = [
        (
            f"micro_batch {row['micro_batch']}, data.workers {row['workers']}",
            f"{row['step_seconds'] * 1e3:.1f}",
            f"{row['data_seconds'] * 1e3:.2f}",
            f"{row['share']:.2%}",
        )
        for row in report["loader"]
    ]
    opened = [
        (
            row["name"],
            f"{row['open_seconds']:.3f}",
            _shown(row["pack_seconds"], "{:.2f}"),
            f"{row['first_batch_seconds']:.3f}",
            f"{row['peak_grown_bytes'] / 1e6:.0f}",
            f"{row['own_grown_bytes'] / 1e6:.0f}",
        )
        for row in report["opening"]
    ]
    packed = [
        (row["name"], row["status"])
        if "status" in row
        else (
            row["name"], f"{row['samples']}", f"{row['rows']}", f"{row['seconds']:.2f}",
            f"{row['efficiency']:.2%}",
        )
        for row in report["packing"]
    ]  # fmt: skip
    tables = [
        columns(header, tokenised, right=True),
        columns(("training", "ms/step", "ms waiting", "share"), waiting, right=True),
        columns(
            (f"{report['opening'][0]['samples']:,} samples", "open s", "pack s", "batch s", "MB",
             "own MB"), opened, right=True,
        ),
        columns(("packing", "samples", "rows", "seconds", "full"), packed, right=True),
    ]  # fmt: skip
    return "\n\n".join(tables) + "\n"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
