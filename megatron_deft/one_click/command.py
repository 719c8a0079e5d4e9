"""The command of tools/one_click.py, with the options of the DEFT release's script_generator.py."""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_deft.config import RunConfig, load_config
from megatron_deft.config.source import Dumper
from megatron_deft.errors import UserError
from megatron_deft.files import atomic_write
from megatron_deft.launch import USER_ERROR
from megatron_deft.objectives import parse
from megatron_deft.one_click.script import Experiment, configuration, file_name, script
from megatron_deft.options import add_number
from megatron_deft.published import MODELS, RECIPES

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write(experiment: Experiment, command: Sequence[str]) -> None:
    """Write the configuration and the script, each whole or not at all.

    Errors: UserError for an override or a layout that cannot be, naming the key.
    """
    text = yaml.dump(configuration(experiment), Dumper=Dumper, sort_keys=False)
    with tempfile.TemporaryDirectory() as folder:  # nothing is left of one that cannot be
        trial = Path(folder) / experiment.config.name
        trial.write_text(text, encoding="utf-8")
        config = load_config(trial, experiment.overrides)
        config.validate(experiment.processes, None)
    _check_own(experiment, config)
    with atomic_write(experiment.config) as handle:
        handle.write(text)
    with atomic_write(experiment.script) as handle:
        handle.write(script(experiment, command))
        Path(handle.name).chmod(0o755)


def _check_own(experiment: Experiment, config: RunConfig) -> None:
    """Errors: UserError for an override of what the rest of the script relies on."""
    given = configuration(experiment)
    own = (
        ("run_dir", config.run_dir, given["run_dir"], "--work_dir"),
        ("objective", config.objective, given["objective"], "--trainer_objective_trans"),
        ("model.load", config.model.load, given["model"]["load"], "--model_path"),
    )
    for name, value, wanted, option in own:
        if value != wanted:
            raise UserError(f"{name}={value}: the script has it from {option}; change that")


def _experiment(args: argparse.Namespace) -> Experiment:
    """What the arguments ask for. Errors: UserError listing what is legal."""
    where = f"recipe {args.recipe}"
    recipe = _chosen("--dataset", args.dataset, RECIPES[args.recipe], where)
    key = args.model_save_name
    _chosen("--model_save_name", key, recipe.models, f"{where} on {args.dataset}")
    objective = args.trainer_objective_trans or recipe.objective
    parse(objective)
    _check_devices(args.nproc_per_node, args.cuda_visible_devices)
    if args.data_source and args.dataset == "figfont":
        raise UserError("--data_source: figfont is made, not read; leave it out")
    root = Path(args.work_dir).absolute()
    kind = [] if args.recipe == "deft" else [args.recipe]
    folder = root.joinpath("scripts", "one_click", *kind, args.dataset, key)
    return Experiment(
        recipe_name=args.recipe,
        dataset=args.dataset,
        key=key,
        objective=objective,
        processes=args.nproc_per_node,
        devices=args.cuda_visible_devices,
        root=root,
        script=_script(args.script or folder / f"{file_name(objective)}.sh"),
        folder=None if args.model_path is None else _existing("--model_path", args.model_path),
        sources=tuple(map(_source, args.data_source)),
        tests=tuple(_existing("--test_data", test) for test in args.test_data),
        overrides=tuple(args.overrides),
        smoke=args.smoke,
    )


def _check_devices(processes: int, devices: str | None) -> None:
    """Errors: UserError unless there is a device for each process."""
    if processes < 1:
        raise UserError(f"--nproc_per_node {processes}: at least 1 is needed")
    if devices is None:
        return
    named = [device.strip() for device in devices.split(",")]
    # CUDA sees nothing from the first empty or negative one on, and none at all with one twice
    if any(not device or device.startswith("-") for device in named):
        raise UserError(f"--cuda_visible_devices {devices!r}: name devices, as in 0,1")
    if len(set(named)) < len(named):
        raise UserError(f"--cuda_visible_devices {devices} has a device twice: name each once")
    if len(named) < processes:
        raise UserError(
            f"--cuda_visible_devices {devices} has fewer devices than --nproc_per_node "
            f"{processes}: name one for each process"
        )


def _script(path: str | Path) -> Path:
    """The script's absolute path. Errors: UserError for one that its configuration would have."""
    if Path(path).suffix.lower() in (".yaml", ".yml"):
        raise UserError(
            f"--script {path}: the run's configuration stands beside the script and ends in "
            ".yaml; choose another ending, such as .sh"
        )
    return Path(path).absolute()


def _chosen(option: str, value: str, table: Mapping[str, Any], where: str) -> Any:
    if value not in table:
        raise UserError(f"{option} {value}: legal for {where} are {', '.join(table)}")
    return table[value]


def _existing(option: str, path: str) -> str:
    """The path as an absolute one: the script runs in another folder."""
    if not Path(path).exists():
        raise UserError(f"{option} {path}: nothing is there")
    return str(Path(path).absolute())


def _source(text: str) -> str:
    is_name = _HUB_NAME.fullmatch(text) and not Path(text).exists()
    return text if is_name else _existing("--data_source", text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="one_click.py",
        description="Write a published experiment as one bash script (prepare, convert, train with "
        "torchrun, convert back, evaluate), and run it if asked to. KEY=VALUE arguments change "
        "single keys of the run's configuration.",
        epilog="example:\n  python tools/one_click.py parallel.tensor=2 --dataset math \\\n"
        "    --model_save_name qwen-2.5-math-1.5b --trainer_objective_trans DEFT \\\n"
        "    --nproc_per_node 8 --run_script",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="such as parallel.tensor=2")
    add("--dataset", required=True, metavar="SET", help="math, medical or figfont")
    add("--model_save_name", required=True, metavar="KEY", help=", ".join(MODELS))
    add("--trainer_objective_trans", metavar="OBJ",
        help="original, p, GeneralFamily-q, OnlyTopP-t, Cayley_Trans, DEFT, ...: those of "
        "`megatron-deft objectives` [the recipe's]")  # fmt: skip
    add("--recipe", choices=tuple(RECIPES), default="deft", help="whose settings [deft]")
    add_number(parser, "--nproc_per_node", 2, "processes, one for each GPU")
    add("--cuda_visible_devices", metavar="0,1", help="GPUs [all]")
    add("--run_script", action="store_true", help="run the script once it is written")
    add("--model_path", metavar="FOLDER", help="a Hugging Face folder in the place of KEY's model")
    add("--data_source", nargs="+", default=[], metavar="FILE",
        help="parquet or JSONL files in the place of the Hub's data set")  # fmt: skip
    add("--test_data", nargs="+", default=[], metavar="FILE",
        help="test sets of the evaluation [the published ones, in WORK_DIR/data/test]")  # fmt: skip
    add("--work_dir", default=".", metavar="FOLDER", help="of data, weights, runs, results [.]")
    add("--script", metavar="FILE", help="[WORK_DIR/scripts/one_click/SET/KEY/OBJ.sh]")
    add("--smoke", action="store_true", help="two steps on a few rows: to see the road work")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the script, and run it with --run_script; returns the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_intermixed_args(given)
    try:
        experiment = _experiment(args)
        write(experiment, ["python", "tools/one_click.py", *given])
    except (UserError, OSError) as error:
        print(f"one_click: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    print(f"{experiment.script}\n{experiment.config}")
    if not args.run_script:
        return 0
    return subprocess.run(["bash", str(experiment.script)], check=False).returncode
