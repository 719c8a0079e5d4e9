"""The commands that prepare and show data; light imports, so that --help is instant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_deft.errors import UserError

if TYPE_CHECKING:
    from megatron_deft.data.prepare.settings import RowSettings

FILES = "parquet, JSONL or JSON files"


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `prepare chat`."""
    _add_sources(parser)
    _add_row_arguments(parser, ("auto", "columns", "messages"))
    _add_length_arguments(parser)
    _add_bad_rows(parser)
    _add_work_arguments(parser)


def add_pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `prepare pretrain`."""
    _add_sources(parser)
    parser.add_argument("--text-key", default="text", metavar="NAME", help="column [text]")
    _add_bad_rows(parser)
    _add_work_arguments(parser)


def add_nemo_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `prepare nemo`."""
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to write: what the recipe's data_dir names")
    for split in ("training", "validation"):
        add(f"--{split}", nargs="+", required=True, metavar="FILE", help=FILES)
    add("--tokenizer", required=True, metavar="HF", help="a Hugging Face folder with a tokenizer")
    _add_row_arguments(parser, ("auto", "columns", "messages"))
    _add_bad_rows(parser)
    add("--limit", type=int, metavar="N", help="first so many rows of each [all]")
    add("--overwrite", action="store_true", help="replace OUT if it has a training.jsonl")
    parser.set_defaults(max_length=None, truncation="right")  # NeMo cuts by its own seq_length


def _add_sources(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to write")
    add("files", nargs="+", metavar="FILE", help=FILES)
    add("--tokenizer", required=True, metavar="HF", help="a Hugging Face folder with a tokenizer")


def _add_row_arguments(parser: argparse._ActionsContainer, formats: tuple[str, ...]) -> None:
    add = parser.add_argument
    add("--format", choices=formats, default="auto", help="of the rows [told by the columns]")
    add(
        "--template", metavar="NAME|FILE",
        help="chat template: chatml, llama3, qwen, deepseek, gemma or a file [the tokenizer's own]",
    )  # fmt: skip
    add("--messages-key", default="messages", metavar="NAME", help="column [messages]")
    add("--tools-key", default="tools", metavar="NAME", help="column, may be absent [tools]")
    for name, key in (("prompt", "question"), ("response", "answer")):
        add(f"--{name}-key", metavar="NAME", help=f"column of the {name} [extra_info]")
        add(
            f"--{name}-dict-keys", metavar="A,B",
            help=f"keys to follow inside it [{key} in extra_info, none in a column you name]",
        )  # fmt: skip
    add(
        "--use-original-prompt", action="store_true",
        help="prompts are whole as they are, special tokens written out: apply no template",
    )  # fmt: skip


def _add_length_arguments(parser: argparse._ActionsContainer) -> None:
    add = parser.add_argument
    add("--max-length", type=int, metavar="N", help="longest sample, tokens [no limit]")
    add(
        "--truncation", choices=("right", "drop", "error"), default="right",
        help="a longer sample is cut at its end, left out and counted, or an error [right]",
    )  # fmt: skip


def _add_bad_rows(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--bad-rows", choices=("error", "drop"), default="error",
        help="a row that cannot be used is an error, or left out and counted [error]",
    )  # fmt: skip


def _add_work_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--limit", type=int, metavar="N", help="first so many rows [all]")
    add("--workers", type=int, metavar="N", help="processes [one for each core]")
    add("--overwrite", action="store_true", help="replace OUT if it is a prepared set")


def run_chat(args: argparse.Namespace) -> int:
    """Prepare a set of conversations, or of prompts and responses; returns 0."""
    return _prepare(args, _settings(args))


def run_pretrain(args: argparse.Namespace) -> int:
    """Prepare a set of documents; returns 0."""
    from megatron_deft.data.prepare.settings import RowSettings

    settings = RowSettings(
        format="text", text_key=args.text_key, bad_rows=args.bad_rows, limit=args.limit
    )
    return _prepare(args, settings)


def run_nemo(args: argparse.Namespace) -> int:
    """Write prompts and answers for NeMo; returns 0."""
    from megatron_deft.data.prepare.nemo import SPLITS, write_nemo

    files = {split: getattr(args, split) for split in SPLITS}
    found = write_nemo(args.out, files, args.tokenizer, _settings(args), overwrite=args.overwrite)
    for split, count in found.items():
        dropped = f", {count['dropped']} dropped" if count["dropped"] else ""
        print(f"{args.out}/{split}.jsonl: {count['rows']} rows{dropped}")
    return 0


def _prepare(args: argparse.Namespace, settings: RowSettings) -> int:
    from megatron_deft.data.inspect import describe
    from megatron_deft.data.prepare.tokenise import prepare_set
    from megatron_deft.processes import available_cores

    workers = available_cores() if args.workers is None else args.workers
    manifest = prepare_set(
        args.out, args.files, args.tokenizer, settings, workers=workers, overwrite=args.overwrite
    )
    print("\n".join(describe(args.out, manifest)))
    return 0


def _settings(args: argparse.Namespace) -> RowSettings:
    from megatron_deft.data.prepare.settings import RowSettings

    chosen: dict[str, Any] = {}
    for name in ("prompt", "response"):
        column, keys = getattr(args, f"{name}_key"), getattr(args, f"{name}_dict_keys")
        if column is not None:
            chosen |= {f"{name}_key": column, f"{name}_dict_keys": ()}
        if keys is not None:
            chosen[f"{name}_dict_keys"] = tuple(key for key in keys.split(",") if key)
    form = args.format
    if chosen:  # only the format columns has those
        if form not in ("auto", "columns"):
            raise UserError(
                f"--prompt-key, --response-key and their keys are for --format columns, not {form}"
            )
        form = "columns"
    same = (
        "template", "messages_key", "tools_key", "use_original_prompt", "max_length",
        "truncation", "bad_rows", "limit",
    )  # fmt: skip
    return RowSettings(format=form, **chosen, **{name: getattr(args, name) for name in same})


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `inspect data`."""
    add = parser.add_argument
    add("path", metavar="PATH", help=f"a prepared set, or one of {FILES}")
    add("--n", type=int, default=3, metavar="N", help="samples to show [3]")
    add("--index", metavar="I,J", help="show these samples of a set [the first]")
    add("--seed", type=int, metavar="N", help="show samples of a set drawn at random")
    add("--checksums", action="store_true", help="compare all of large files, too [64 MiB]")
    add("--json", action="store_true", help="print one JSON object")
    add("--tokenizer", metavar="HF", help="a Hugging Face folder; a set must be made with it")
    group = parser.add_argument_group("for a file that is not prepared")
    group.add_argument("--text-key", default="text", metavar="NAME", help="of format text [text]")
    _add_row_arguments(group, ("auto", "columns", "messages", "text"))
    _add_length_arguments(group)
    _add_bad_rows(group)


def run_inspect(args: argparse.Namespace) -> int:
    """Show samples of a set or of a file; returns 0, or 1 when a checksum differs."""
    from dataclasses import replace
    from pathlib import Path

    from megatron_deft.data.inspect import inspect_file, inspect_set
    from megatron_deft.data.tokenizer import load_tokenizer

    if args.n < 0:
        raise UserError(f"--n {args.n}: at least 0 is needed")
    if not Path(args.path).exists():
        raise UserError(
            f"{args.path}: no such file or folder: name a set that `megatron-deft prepare` wrote, "
            f"or one of {FILES}"
        )
    color = sys.stdout.isatty() and not args.json
    if Path(args.path).is_file():
        if args.tokenizer is None:
            raise UserError(
                f"{args.path} is a file: add --tokenizer HF to see how it would be tokenised"
            )
        unused = _given(args, ("index", "seed", "checksums"))
        if unused:
            raise UserError(f"{', '.join(unused)}: for prepared sets; {args.path} is a file")
        args.limit = max(args.n, 1)
        settings = replace(_settings(args), text_key=args.text_key)
        found = inspect_file(args.path, args.tokenizer, settings, color, show=args.n)
    else:
        names = ("format", "max_length", "use_original_prompt")
        unused = _given(args, (*names, *(["template"] if args.tokenizer is None else [])))
        if unused:
            raise UserError(f"{', '.join(unused)}: for files; {args.path} is prepared already")
        tokenizer = args.tokenizer and load_tokenizer(args.tokenizer, args.template)
        found = inspect_set(
            args.path, _chosen(args), args.seed, args.n, args.checksums, color, tokenizer
        )
    print(json.dumps(found.to_json(), indent=2, ensure_ascii=False) if args.json else found.text())
    return 1 if found.damaged else 0


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """Those of the options that were given; each is None, false or "auto" where it was not."""
    values = {name: getattr(args, name) for name in names}
    given = [n for n, v in values.items() if v is not None and v is not False and v != "auto"]
    return [f"--{name.replace('_', '-')}" for name in given]


def _chosen(args: argparse.Namespace) -> list[int] | None:
    if args.index is None:
        return None
    try:
        return [int(index) for index in args.index.split(",")]
    except ValueError:
        raise UserError(f"--index {args.index}: expected numbers, such as 0,17") from None


class Command(NamedTuple):
    """A command of `prepare` or `inspect`."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    text: str
    example: str


PREPARE = {
    "chat": Command(
        add_chat_arguments,
        run_chat,
        "Tokenise conversations, or prompts and responses, into a set for training. Rows come from "
        "parquet, JSONL or JSON files of a column of messages or of two columns; assistant turns "
        "are trained. Interrupted, the same command goes on where it stopped. The result is the "
        "same whatever the number of workers.",
        "data/chat train.jsonl --tokenizer Qwen2.5-1.5B --max-length 2048 --truncation drop\n"
        "  megatron-deft prepare chat data/math math/train.parquet --format columns "
        "--tokenizer Llama-3.1-8B --template llama3",
    ),
    "nemo": Command(
        add_nemo_arguments,
        run_nemo,
        "Write prompts and answers for NeMo's fine-tuning. OUT gets training.jsonl and "
        "validation.jsonl, with prompts as the model shall see them, written by the chat template. "
        "Rows are those of `prepare chat`, with one trained turn each.",
        "data/nemo/math --training data/math/train.parquet --validation data/math/val.parquet "
        "--tokenizer Qwen2.5-Math-1.5B",
    ),
    "pretrain": Command(
        add_pretrain_arguments,
        run_pretrain,
        "Tokenise documents into a set for continued pretraining. Each row of the parquet, JSONL "
        "or JSON files has a text; the tokenizer's eos is put after it. megatron-core's GPTDataset "
        "reads the result. Interrupted, the same command goes on where it stopped.",
        "data/corpus corpus/*.parquet --tokenizer Qwen2.5-1.5B",
    ),
}
INSPECT = {
    "data": Command(
        add_inspect_arguments,
        run_inspect,
        "Show what a prepared set holds. Where it comes from, its lengths, what was left out and "
        "why, and samples with their trained tokens marked. Of a parquet, JSONL or JSON file, how "
        "its first rows would be tokenised. Exits with 1 when a checksum differs.",
        "data/chat --n 3\n"
        "  megatron-deft inspect data train.jsonl --tokenizer Qwen2.5-1.5B --template chatml",
    ),
}
