"""The command `evaluate general`; light imports, so that --help is instant."""

from __future__ import annotations

import argparse

from megatron_deft.evaluation.shared_arguments import (
    add_model_arguments,
    add_output_arguments,
    names_of,
    show,
)
from megatron_deft.options import add_number

DESCRIPTION = (
    "Score Hugging Face folders on general tests, to see what fine-tuning made them forget. Any "
    "task of lm-eval (pip install 'megatron-deft[general]'), or a YAML file of your own. Prints "
    "each model's scores and its differences to the first. A rerun asks only what is missing."
)
EXAMPLE = (
    "hf/base hf/deft --tasks mmlu,ifeval --out results/general\n"
    "  megatron-deft evaluate general hf/base hf/deft --tasks mine --include-path my_tasks"
)


def add_general_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `evaluate general`."""
    add = parser.add_argument
    add_model_arguments(parser)
    add(
        "--tasks", required=True, metavar="A,B",
        help="tasks, groups, tags or patterns of lm-eval (`lm-eval ls tasks`), or YAML files",
    )  # fmt: skip
    add("--include-path", metavar="FOLDER", help="where YAML files of further tasks are")
    add_output_arguments(parser, "what a rerun needs")
    add(
        "--apply-chat-template", action="store_true",
        help="ask through the tokenizer's chat template [plain text]",
    )  # fmt: skip
    add_number(parser, "--limit", None, "first so many questions of each task")
    add_number(parser, "--num-fewshot", None, "examples before each question [the task's own]")
    add_number(parser, "--batch-size", 8, "questions asked together, with transformers")


def run_general(args: argparse.Namespace) -> int:
    """Score the models and print the tables; returns 0."""
    from megatron_deft.evaluation.general import describe, evaluate

    results = evaluate(
        args.models,
        [task for task in args.tasks.split(",") if task],
        include_path=args.include_path,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        engine=args.engine,
        out=args.out,
        names=names_of(args),
        dtype=args.dtype,
        apply_chat_template=args.apply_chat_template,
    )
    return show(args, results, describe)
