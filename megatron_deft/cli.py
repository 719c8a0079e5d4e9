"""The command `megatron-deft`: each subcommand reads its arguments and calls one library function.

Imports stay inside the commands, so that `--help` is instant. Exit codes: 0, 1 (a comparison or a
check that failed, a crash), 2 (a mistake of the user: one line on stderr), 130 (interrupted).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import islice
from typing import Any

from megatron_deft.benchmarks.arguments import BENCHMARKS
from megatron_deft.convert.arguments import (
    add_export_arguments,
    add_import_arguments,
    add_inspect_arguments,
    add_verify_arguments,
    run_export,
    run_import,
    run_inspect,
    run_verify,
)
from megatron_deft.data.arguments import INSPECT, PREPARE
from megatron_deft.data.prepare.arguments import (
    add_figfont_arguments,
    add_math_arguments,
    add_medical_arguments,
    run_figfont,
    run_math,
    run_medical,
)
from megatron_deft.errors import TransientError, UserError
from megatron_deft.evaluation.arguments import EVALUATE
from megatron_deft.launch import USER_ERROR, Nodes, is_rank, launch, report_user_error
from megatron_deft.options import add_number
from megatron_deft.report.arguments import EXAMPLE as REPORT_EXAMPLE
from megatron_deft.report.arguments import TEXT as REPORT_TEXT
from megatron_deft.report.arguments import add_report_arguments, run_report

Arguments = argparse.Namespace


def _objectives(args: Arguments) -> int:
    from megatron_deft.objectives import describe

    print(describe())
    return 0


def _tiny(args: Arguments) -> int:
    from megatron_deft.data.rows import read_rows, strings
    from megatron_deft.data.tiny import make_tiny_llama

    rows = islice(read_rows(args.corpus, [args.column]), args.rows)
    make_tiny_llama(
        args.out,
        (text for _, row in rows for text in strings(row[args.column])),
        vocab_size=args.vocab_size,
        split=args.split,
        hidden_size=args.hidden_size,
        layers=args.layers,
        heads=args.heads,
        kv_heads=args.kv_heads,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    print(f"{args.out}: a tiny Llama with random weights")
    return 0


def _train(args: Arguments) -> int:
    from megatron_deft.config import config_help, dump_yaml, load_config

    if args.help_config:
        print(config_help())
        return 0
    from megatron_deft.data.check import check_data
    from megatron_deft.training.base import read_base
    from megatron_deft.training.obstacles import obstacles, obstacles_to_monitors
    from megatron_deft.training.run import run

    if args.config is None:
        raise UserError("train needs a configuration file: megatron-deft train CONFIG")
    nodes = Nodes(
        args.nproc_per_node, args.nnodes, args.node_rank, args.rdzv_endpoint, args.max_restarts
    )
    wants_agent = nodes.world_size > 1 or nodes.restarts > 0
    if is_rank() and wants_agent and "LOCAL_RANK" in os.environ:
        raise UserError(
            "a launcher started this process: drop --nproc-per-node, --nnodes and --max-restarts"
        )
    started = is_rank() and nodes.world_size == 1
    overrides = [*args.overrides, *(["train.resume=must"] if args.resume else [])]
    if args.exit_duration is not None:
        overrides.append(f"train.exit_duration={args.exit_duration}")
    world_size = int(os.environ["WORLD_SIZE"]) if started else nodes.world_size
    config = load_config(args.config, overrides)
    spec = read_base(config.model).spec
    config.validate(world_size, spec)
    check_data(config.data)
    if args.dry_run:
        ranks, batches = config.data_parallel(world_size), config.micro_batches(world_size)
        print(dump_yaml(config), end="")
        print(f"# {world_size} processes, {ranks} of them data parallel")
        print(f"# {batches} micro-batches per step and data-parallel rank")
        for line in [*obstacles(config, spec), *obstacles_to_monitors(config.monitor)]:
            print(f"megatron-deft: warning: not on this machine: {line}", file=sys.stderr)
        return 0
    if not wants_agent:
        run(config)
        return 0
    again = ["--traceback"] if args.traceback else []
    return launch(["-m", "megatron_deft", "train", args.config, *overrides, *again], nodes)


def _bench(args: Arguments) -> int:
    code: int = import_module(f"megatron_deft.benchmarks.{args.benchmark}").run(args)
    return code


def _doctor(args: Arguments) -> int:
    from megatron_deft.doctor import examine, healthy, report

    findings = examine()
    print(json.dumps([f._asdict() for f in findings], indent=2) if args.json else report(findings))
    return 0 if healthy(findings) else 1


Group = Any  # argparse's subparsers, whose class has no public name


def _command(
    group: Group, name: str, call: Callable[[Arguments], int], text: str, example: str
) -> argparse.ArgumentParser:
    """Add a command: one paragraph of description, one example."""
    parser: argparse.ArgumentParser = group.add_parser(
        name,
        help=text.partition(".")[0],
        description=textwrap.fill(text, 90),
        epilog=f"example:\n  megatron-deft {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(call=call, parser=parser)
    return parser


def _group(parent: Group, name: str, text: str) -> Group:
    parser = parent.add_parser(name, help=text, description=text, allow_abbrev=False)
    return parser.add_subparsers(required=True, metavar="COMMAND")


def _add_train(commands: Group) -> None:
    train = _command(
        commands, "train", _train,
        "Fine-tune a model with a gated objective. CONFIG is a YAML file; KEY=VALUE arguments "
        "change single keys. The configuration and the layout are checked before anything is "
        "started. On a machine without a GPU it trains on the CPU. With several machines, run the "
        "same command on each. With --max-restarts a rank that dies makes all start again, from "
        "the newest whole checkpoint. Under torchrun, give CONFIG and keys.",
        "train run.yaml objective=dft optim.lr=2e-5 --nproc-per-node 8",
    )  # fmt: skip
    train.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as optim.lr=2e-5")
    add_number(train, "--nproc-per-node", 1, "processes on this machine, one per GPU")
    add_number(train, "--nnodes", 1, "machines")
    train.add_argument(
        "--rdzv-endpoint", metavar="HOST:PORT", help="where several machines meet: one of them"
    )
    add_number(train, "--node-rank", None, "0 where the endpoint is, when its name does not tell")
    add_number(train, "--max-restarts", 0, "how often the ranks may fail and start again")
    train.add_argument("--resume", action="store_true", help="the same as train.resume=must")
    train.add_argument(
        "--exit-duration", metavar="TIME", help="the same as train.exit_duration, such as 3h50m"
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check, print the whole config, stop; warns of what this machine lacks for it",
    )
    train.add_argument(
        "--help-config", action="store_true", help="print every key with its meaning"
    )


def _add_convert(commands: Group) -> None:
    group = _group(commands, "convert", "Between Hugging Face, NeMo 2 and training weights")
    add_import_arguments(_command(
        group, "import", run_import,
        "Convert a Hugging Face folder, or a NeMo 2 checkpoint, into weights for model.load. The "
        "result is free of any parallel layout, and is compared with the original before it is "
        "kept: logit by logit, or with NeMo's tensor by tensor. NeMo need not be installed.",
        "convert import Qwen2.5-1.5B weights/qwen2.5-1.5b\n"
        "  megatron-deft convert import nemo://meta-llama/Llama-3.1-8B weights/llama3.1-8b",
    ))  # fmt: skip
    add_export_arguments(_command(
        group, "export", run_export,
        "Convert trained weights into a Hugging Face folder that transformers and vLLM read, or "
        "into a NeMo 2 checkpoint; the latter where NeMo is installed. "
        "CHECKPOINT is a checkpoint, a run folder (its latest checkpoint) or imported weights.",
        "convert export runs/deft hf/deft\n"
        "  megatron-deft convert export runs/deft nemo/deft --format nemo",
    ))  # fmt: skip
    add_verify_arguments(_command(
        group, "verify", run_verify,
        "Compare two models, each a Hugging Face folder or one of ours. Every tensor is compared "
        "bit for bit; both compute the same tokens, and the difference of every layer's output is "
        "printed. Exits with 1 when the models differ.",
        "convert verify Qwen2.5-1.5B weights/qwen2.5-1.5b",
    ))  # fmt: skip
    add_inspect_arguments(_command(
        group, "inspect", run_inspect,
        "Show what a folder is. Its kind, the architecture, where the weights come from, whether "
        "it is whole. Reads headers only. Exits with 1 when the folder is damaged.",
        "convert inspect runs/deft",
    ))  # fmt: skip


def _add_data(commands: Group) -> None:
    prepare = _group(commands, "prepare", "Make data to train on, and tokenise it")
    inspect = _group(commands, "inspect", "Show what is in data")
    for group, kind, table in ((prepare, "prepare", PREPARE), (inspect, "inspect", INSPECT)):
        for name, (add_arguments, run, text, example) in table.items():
            add_arguments(_command(group, name, run, text, f"{kind} {name} {example}"))
    add_math_arguments(_command(
        prepare, "math", run_math,
        "Write a math data set: NuminaMath-CoT, its subset of 67,000 problems, or MATH. With the "
        "released columns, instruction and boxed answers. Validation is the first 128 rows, "
        "which stay in train, as in the releases. Local files need no network.",
        "prepare math data/math\n"
        "  megatron-deft prepare math data/math --source NuminaMath-CoT/data --limit 100000",
    ))  # fmt: skip
    add_medical_arguments(_command(
        prepare, "medical", run_medical,
        "Write the medical data set m23k. With the released prompts and responses for Llama, Qwen "
        "and DeepSeek, with and without thinking, and the answer letter. Validation is the first "
        "128 rows, which stay in train, as in the releases. Local files need no network.",
        "prepare medical data/medical\n"
        "  megatron-deft prepare medical data/medical --source m23k/train.parquet",
    ))  # fmt: skip
    add_figfont_arguments(_command(
        prepare, "figfont", run_figfont,
        "Write the FigFont data set: words drawn as ASCII art, to be read. The defaults are the "
        "paper's 40,000 training and 5,000 test samples, checked by their checksum; no download.",
        "prepare figfont data/figfont",
    ))  # fmt: skip
    tiny = _command(
        commands, "tiny", _tiny,
        "Make a tiny Llama with random weights as a whole Hugging Face folder. Its tokenizer is "
        "learnt from the texts of --corpus. For trying things out: it needs no download.",
        "tiny hf/tiny --corpus data/figfont/train.parquet",
    )  # fmt: skip
    tiny.add_argument("out", metavar="OUT", help="folder to write")
    tiny.add_argument(
        "--corpus", nargs="+", required=True, metavar="FILE", help="parquet or JSONL files"
    )
    tiny.add_argument("--column", default="messages", help="column of the texts [messages]")
    add_number(tiny, "--rows", 2000, "rows of the corpus that the tokenizer learns from")
    add_number(tiny, "--vocab-size", 512, "tokens")
    tiny.add_argument("--split", metavar="REGEX", help="what no token reaches across [GPT-2's]")
    add_number(tiny, "--hidden-size", 64, "channels")
    add_number(tiny, "--layers", 2, "layers")
    add_number(tiny, "--heads", 4, "attention heads")
    add_number(tiny, "--kv-heads", 2, "key-value heads")
    add_number(tiny, "--seed", 1234, "of the weights")
    tiny.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")


def _add_evaluate(commands: Group) -> None:
    group = _group(commands, "evaluate", "Score models on a task")
    for name, (add_arguments, run, text, example) in EVALUATE.items():
        add_arguments(_command(group, name, run, text, f"evaluate {name} {example}"))


def _add_bench(commands: Group) -> None:
    group = _group(commands, "bench", "Measure speed and memory")
    for name, (add_arguments, text, example) in BENCHMARKS.items():
        parser = _command(group, name, _bench, text, f"bench {name} {example}")
        parser.set_defaults(benchmark=name)
        add_arguments(parser)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from megatron_deft import __version__

    parser = argparse.ArgumentParser(
        prog="megatron-deft",
        description="Supervised fine-tuning on megatron-core with gated objectives "
        "(NLL, DFT, EAFT, Tsallis, Cayley, DEFT).",
        epilog="`megatron-deft COMMAND --help` describes a command with an example.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megatron-deft {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error arose (anywhere on the line)"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _command(
        commands, "objectives", _objectives,
        "List the training objectives. Each with its spellings, loss, gate, parameters and source.",
        "objectives",
    )  # fmt: skip
    _add_data(commands)
    _add_train(commands)
    _add_convert(commands)
    _add_evaluate(commands)
    add_report_arguments(_command(commands, "report", run_report, REPORT_TEXT, REPORT_EXAMPLE))
    _add_bench(commands)
    _command(
        commands, "doctor", _doctor,
        "Show what is installed and what is missing. Everything missing is named with its remedy; "
        "exits with 1 when it is something required.",
        "doctor",
    ).add_argument("--json", action="store_true", help="print a list of objects")  # fmt: skip
    return parser


def _parse(argv: Sequence[str]) -> Arguments:
    parser = build_parser()
    wanted = [argument for argument in argv if argument != "--traceback"]
    args, rest = parser.parse_known_args(wanted)
    # argparse takes positionals in one block: overrides after an option come back as the rest.
    if "overrides" in args and not any(argument.startswith("-") for argument in rest):
        args.overrides += rest
    elif rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.traceback = len(wanted) < len(argv)
    return args


def _message(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megatron_deft").setLevel(logging.INFO)
    warnings.simplefilter("ignore", FutureWarning)  # of torch and megatron-core to each other
    if not sys.stderr.isatty():  # transformers would draw its bars into the log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code: int = args.call(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `megatron-deft objectives | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        if args.traceback:
            traceback.print_exc()
        line = f"megatron-deft: error: {_message(error)}"
        if isinstance(error, TransientError):
            print(line, file=sys.stderr)
            return 1
        report_user_error(line)
        return USER_ERROR
    except KeyboardInterrupt:
        if args.traceback:
            traceback.print_exc()
        return 130
