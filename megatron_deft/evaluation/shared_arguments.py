"""What the commands of `evaluate` have in common; light imports, so that --help is instant."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which models are asked, and by what."""
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="Hugging Face folders; the first is the base")
    add("--names", metavar="A,B", help="names in the tables [the folders']")
    add("--engine", choices=("auto", "transformers", "vllm"), default="auto")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto")


def names_of(args: argparse.Namespace) -> list[str] | None:
    """--names, one by one; None without."""
    return args.names.split(",") if args.names else None


def add_output_arguments(parser: argparse.ArgumentParser, kept: str) -> None:
    """Declare where results go; `kept`: what is written beside them."""
    add = parser.add_argument
    add("--out", metavar="PATH", help=f"folder for results.json and {kept}, or a .json file")
    add("--json", action="store_true", help="print the results as JSON")


def show(
    args: argparse.Namespace, results: dict[str, Any], describe: Callable[[dict[str, Any]], str]
) -> int:
    """Print the results as was asked for; returns 0."""
    print(json.dumps(results, indent=2) if args.json else describe(results))
    return 0
