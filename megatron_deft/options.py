"""Options that several commands have."""

import argparse


def add_number(parser: argparse.ArgumentParser, name: str, default: int | None, help: str) -> None:
    """A whole number, with its default in the help."""
    shown = "" if default is None else f" [{default}]"
    parser.add_argument(name, type=int, default=default, metavar="N", help=help + shown)
