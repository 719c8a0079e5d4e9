"""The commands `prepare math|medical|figfont`; light imports, so that --help is instant."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_deft.data.manifest import MANIFEST
from megatron_deft.data.prepare.released import M23K_PROCESSED, MATH, MEDICAL, NUMINA_SUBSET
from megatron_deft.errors import UserError
from megatron_deft.options import add_number

if TYPE_CHECKING:
    from megatron_deft.data.prepare.settings import RowSettings


def add_math_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `prepare math`."""
    _add_set_arguments(parser, NUMINA_SUBSET)
    add = parser.add_argument
    add(
        "--prompt-type", nargs="+", default=[], choices=tuple(MATH), metavar="TYPE",
        help="write out released prompts too, as columns for data.use_original_prompt: "
        + ", ".join(MATH),
    )  # fmt: skip
    add("--boxed-only", action="store_true", help="drop rows without a boxed answer")
    _add_tokenising_arguments(parser, 3072, "the first --prompt-type, else its chat template")


def add_medical_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `prepare medical`."""
    _add_set_arguments(parser, M23K_PROCESSED)
    _add_tokenising_arguments(parser, 800, "--prompt-type, else its chat template")
    add = parser.add_argument
    add("--prompt-type", choices=tuple(MEDICAL), help="for --tokenizer: the released prompts of")
    add("--thinking", action="store_true", help="for --prompt-type: train on the thinking too")


def add_figfont_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `prepare figfont`."""
    parser.add_argument("out", metavar="OUT", help="folder to write")
    add_number(parser, "--train-size", None, "first so many training samples")
    add_number(parser, "--test-size", None, "first so many test samples")
    add_number(parser, "--min-word-len", 2, "shortest word, letters")
    add_number(parser, "--max-word-len", 5, "longest word, letters")
    parser.add_argument("--fonts", metavar="A,B", help="pyfiglet fonts [the paper's]")
    add_number(parser, "--seed", 42, "of words and fonts")
    _overwrite(parser)


def _add_set_arguments(parser: argparse.ArgumentParser, source: str) -> None:
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to write")
    add(
        "--source", nargs="+", default=[source], metavar="SOURCE",
        help=f"parquet or JSONL files, a folder of them, or an id of the Hub [{source}]",
    )  # fmt: skip
    add_number(parser, "--limit", None, "first so many rows of the source")
    add_number(parser, "--val-size", 128, "rows of val.parquet, the first ones")
    add("--hold-out", action="store_true", help="leave the rows of val.parquet out of train")
    add_number(parser, "--seed", None, "draw the rows of --limit and of val by it, not the first")
    add("--bad-rows", choices=("error", "drop"), default="error",
        help="a row that cannot be used is an error, or left out and counted [error]")  # fmt: skip
    _overwrite(parser)


def _add_tokenising_arguments(
    parser: argparse.ArgumentParser, max_length: int, prompt: str
) -> None:
    group = parser.add_argument_group("tokenising", "into OUT/train and OUT/val, for training")
    add = group.add_argument
    add("--tokenizer", metavar="FOLDER", help=f"a Hugging Face folder; the prompt: {prompt}")
    add("--template", metavar="NAME", help="chat template instead of the tokenizer's: name or file")
    add("--max-length", type=int, default=max_length, metavar="N",
        help=f"tokens of a sample, longer ones are cut [{max_length}]")  # fmt: skip
    add("--workers", type=int, default=1, metavar="N", help="processes [1]")


def _overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def run_math(args: argparse.Namespace) -> int:
    """Write the math data set; returns 0."""
    from megatron_deft.data.prepare.math import prepare_math

    column, write = MATH[args.prompt_type[0]] if args.prompt_type else (None, None)
    settings = _settings(args, column, "question", "answer")
    _check_tokenising(args, settings, write("") if write else None)
    info = prepare_math(
        args.out, args.source, args.prompt_type, args.boxed_only, choice=_choice(args)
    )
    _report(args.out, info)
    _tokenise(args, settings)
    return 0


def run_medical(args: argparse.Namespace) -> int:
    """Write the medical data set; returns 0."""
    from megatron_deft.data.prepare.medical import prepare_medical

    family = args.prompt_type
    if args.thinking and not family:
        raise UserError("--thinking goes with --prompt-type: name llama, qwen or deepseek")
    if family and not args.tokenizer:
        raise UserError("--prompt-type goes with --tokenizer: all prompts are written anyway")
    response = "response_with_thinking" if args.thinking else "reponse_no_thinking"
    settings = _settings(
        args,
        f"{family}_prompt" if family else None,
        "question_instruction",
        f"{family}_{response}" if family else "answer_raw",
    )
    _check_tokenising(args, settings, MEDICAL[family][0]("") if family else None)
    info = prepare_medical(args.out, args.source, choice=_choice(args))
    _report(args.out, info)
    _tokenise(args, settings)
    return 0


def run_figfont(args: argparse.Namespace) -> int:
    """Write the FigFont data set; returns 0."""
    from megatron_deft.data.prepare.figfont import prepare_figfont

    info = prepare_figfont(
        args.out,
        train_size=args.train_size,
        test_size=args.test_size,
        min_word_len=args.min_word_len,
        max_word_len=args.max_word_len,
        fonts=args.fonts.split(",") if args.fonts else None,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    rows = ", ".join(f"{count} {split}" for split, count in info["rows"].items())
    print(f"{args.out}: {rows} ({info['kind']})")
    return 0


def _check_tokenising(args: argparse.Namespace, settings: RowSettings, prompt: str | None) -> None:
    """Whether tokenising will go, before the rows are written, which takes minutes.

    `prompt`: one that is written out, whose special tokens the tokenizer must have.
    """
    if args.tokenizer is None:
        if args.template is not None:
            raise UserError("--template goes with --tokenizer, which is missing")
        return
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1 is needed")
    from megatron_deft.data.prepare.samples import Tokeniser
    from megatron_deft.data.templates import check_marks
    from megatron_deft.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer, settings.template)
    Tokeniser(tokenizer, settings, settings.format)
    if prompt is not None:
        check_marks(tokenizer, prompt)


def _choice(args: argparse.Namespace) -> Any:
    from megatron_deft.data.prepare.splits import Choice

    return Choice(
        limit=args.limit,
        val_size=args.val_size,
        hold_out=args.hold_out,
        seed=args.seed,
        bad_rows=args.bad_rows,
        overwrite=args.overwrite,
        reuse=not args.overwrite and _is_unfinished(args),
    )


def _is_unfinished(args: argparse.Namespace) -> bool:
    """Whether OUT has rows that this command, killed before, did not tokenise to the end."""
    files = list(Path(args.out).glob("*.parquet")) if args.tokenizer else []
    return not all((file.with_suffix("") / MANIFEST).is_file() for file in files)


def _report(out: str, info: dict[str, Any]) -> None:
    rows = info["rows"]
    print(f"{out}: {rows['train']} train, {rows['val']} val ({info['val']})")
    kept = {"kept without a ground truth": info["no_ground_truth"]["count"]}
    dropped = {f"dropped, {reason}": what["count"] for reason, what in info["dropped"].items()}
    for what, count in (kept | dropped).items():
        if count:
            print(f"{out}: {count} rows {what}: see info.json")


def _settings(
    args: argparse.Namespace, original: str | None, question: str, response: str
) -> RowSettings:
    """How the rows that are written will be tokenised. Errors: UserError for a bad option."""
    from megatron_deft.data.prepare.settings import RowSettings

    return RowSettings(
        format="columns",
        prompt_dict_keys=(original or question,),
        response_dict_keys=(response,),
        use_original_prompt=original is not None,
        max_length=args.max_length,
        bad_rows=args.bad_rows,
        template=args.template,
    )


def _tokenise(args: argparse.Namespace, settings: RowSettings) -> None:
    """Make OUT/train and OUT/val of what was written, if a tokenizer was given."""
    if args.tokenizer is None:
        return
    from megatron_deft.data.inspect import describe
    from megatron_deft.data.prepare.tokenise import prepare_set

    for split in ("train", "val"):
        file = Path(args.out) / f"{split}.parquet"
        if file.exists():
            out = file.with_suffix("")
            made = prepare_set(
                out, [str(file)], args.tokenizer, settings, workers=args.workers, reuse=True
            )
            print("\n".join(describe(out, made)))
