"""The commands of `evaluate`; light imports, so that --help is instant."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from megatron_deft.evaluation.general_arguments import (
    DESCRIPTION,
    EXAMPLE,
    add_general_arguments,
    run_general,
)
from megatron_deft.evaluation.shared_arguments import (
    add_model_arguments,
    add_output_arguments,
    names_of,
    show,
)
from megatron_deft.options import add_number

Arguments = argparse.Namespace

_ANSWERS = (
    "Answers are written beside the results as they come; the same command goes on where it was "
    "stopped, and `evaluate score` scores them again without a model."
)
_TASKS = {  # name -> description, example
    "math": (
        "Score Hugging Face folders on sets of math problems. Each problem is answered 16 times at "
        "temperature 1, as released: the means over the answers (avg@16) and the chances that one "
        f"of k is right (pass@k). Answers are compared by math-verify. {_ANSWERS}",
        "hf/base hf/deft --data math_oai.jsonl minerva_math.jsonl aime24.jsonl "
        "--prompt-type qwen-boxed --out results/math",
    ),
    "medical": (
        "Score Hugging Face folders on medical multiple choice. Decoding is greedy, as released; "
        f"the scores are the shares of right options, of each source and their mean. {_ANSWERS}",
        "hf/base hf/deft --data medical.json --prompt-type qwen_prompt --out results/medical",
    ),
    "figfont": (
        "Score Hugging Face folders on FigFont. Decoding is greedy; the scores are exact match, "
        f"exact match without case, and Jaro-Winkler similarity. {_ANSWERS}",
        "hf/tiny hf/deft --names base,deft --data data/figfont/test.parquet --out results/figfont",
    ),
}


def _add_task_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_arguments(parser)
    add("--data", nargs="+", required=True, metavar="FILE", help="files of questions")
    _add_output_arguments(parser)
    add(
        "--prompt-type", metavar="NAME",
        help="chat (the tokenizer's template), or a released prompt; a wrong name lists them",
    )  # fmt: skip
    add_number(parser, "--limit", None, "first so many questions of each set")
    add_number(parser, "--batch-size", 16, "answers decoded together")
    add_number(parser, "--samples", None, "answers to each question [the task's]")
    add_number(parser, "--max-new-tokens", None, "tokens of an answer [the task's]")
    add_number(parser, "--seed", None, "of the answers that are drawn [0]")
    add("--temperature", type=float, metavar="T", help="0 is greedy [the task's]")
    add("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of mass P [1]")


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add_output_arguments(parser, "the answers")
    add_number(parser, "--workers", None, "processes that score [all cores]")


def _add_score_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="generations_NAME.jsonl; the first is the base")
    _add_output_arguments(parser)
    add("--partial", action="store_true", help="score what there is of unfinished files")


def _run_task(name: str, args: Arguments) -> int:
    from megatron_deft.evaluation.results import describe
    from megatron_deft.evaluation.run import Choices, evaluate
    from megatron_deft.evaluation.scoring import find_task

    names = ("prompt_type", "samples", "max_new_tokens", "temperature", "top_p", "seed", "limit")
    choices = Choices(
        **{key: getattr(args, key) for key in names},
        engine=args.engine,
        batch_size=args.batch_size,
        dtype=args.dtype,
    )
    results = evaluate(
        find_task(name), args.models, args.data, args.out, choices,
        names=names_of(args), workers=args.workers,
    )  # fmt: skip
    return show(args, results, describe)


def _run_score(args: Arguments) -> int:
    from megatron_deft.evaluation.results import describe
    from megatron_deft.evaluation.scoring import score

    results = score(args.files, args.out, workers=args.workers, partial=args.partial)
    return show(args, results, describe)


# name -> adds its arguments, runs it, description, example
EVALUATE: dict[str, tuple[Callable[..., None], Callable[[Arguments], int], str, str]] = {
    name: (_add_task_arguments, partial(_run_task, name), text, example)
    for name, (text, example) in _TASKS.items()
} | {
    "general": (add_general_arguments, run_general, DESCRIPTION, EXAMPLE),
    "score": (
        _add_score_arguments,
        _run_score,
        "Score answers that were written by `evaluate`. It needs no model: for another version of "
        "the scoring, another machine, or another choice of models to compare.",
        "results/math/generations_base.jsonl results/math/generations_deft.jsonl",
    ),
}
