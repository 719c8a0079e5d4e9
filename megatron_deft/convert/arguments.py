"""The commands `convert verify` and `convert inspect`; light imports, so that --help is instant."""

from __future__ import annotations

import argparse
import json


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `convert verify`."""
    add = parser.add_argument
    folder = "a Hugging Face folder, weights, a checkpoint or a run"
    add("a", metavar="A", help=folder)
    add("b", metavar="B", help="another one, of the same or the other kind")
    add(
        "--prompt", action="append", metavar="TEXT", dest="prompts",
        help="compare on this text in place of the built-in ones; may be repeated",
    )  # fmt: skip
    add(
        "--dtype", choices=("fp32", "bf16"),
        help="round all weights to it first [the coarser of the two stored]",
    )  # fmt: skip


def run_verify(args: argparse.Namespace) -> int:
    """Print the comparison; returns 0, or 1 when the models differ."""
    from megatron_deft.convert.verify import verify

    report = verify(args.a, args.b, args.prompts, args.dtype)
    width = max(map(len, report.stages))
    for stage, difference in report.stages.items():
        print(f"{stage:<{width}}  {difference:.1e}")
    print(f"{report.tensors.compared} tensors compared bit for bit")
    print(f"{report.tokens} tokens, positions up to {report.furthest}")
    if report.by_layer:
        print(f"every layer by itself, without {report.undecided} choices between equal experts")
    print("equal" if report.ok else "\n".join(f"DIFFERENT: {fault}" for fault in report.faults))
    return 0 if report.ok else 1


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `convert inspect`."""
    add = parser.add_argument
    add("path", metavar="PATH", help="a Hugging Face folder, weights, a checkpoint or a run")
    add("--tensors", action="store_true", help="list every tensor with its dtype and shape")
    add("--checksums", action="store_true", help="read every file and compare its checksum")
    add("--json", action="store_true", help="print one JSON object")


def run_inspect(args: argparse.Namespace) -> int:
    """Print what the folder is; returns 0, or 1 when it is damaged."""
    from megatron_deft.convert.inspect import describe, inspect

    found = inspect(args.path, args.checksums)
    if args.json:
        print(json.dumps(found.to_json(args.tensors), indent=2))
    else:
        print(describe(found, args.tensors))
    return 1 if found.problems else 0
