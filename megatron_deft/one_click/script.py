"""An experiment as files: the run's configuration, and the bash script around it.

Every word that a user or a path brings into the script goes through shlex.quote. A step is left out
when what it makes is there, which all of these commands make appear whole or not at all.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from megatron_deft.published import MODELS, RECIPES, SOURCES, Keys, Recipe

SMOKE: Keys = {
    "model.dtype": "fp32", "data.max_length": 800, "train.epochs": None, "train.steps": 2,
    "train.micro_batch": 1, "train.save_every": None, "train.val_every": None,
}  # fmt: skip
"""What --smoke changes in the configuration, beside train.global_batch: one sample a process."""

SMOKE_PREPARE: Mapping[str, tuple[str, ...]] = {
    "math": ("--limit", "16", "--val-size", "4"),
    "medical": ("--limit", "16", "--val-size", "4"),
    "figfont": ("--train-size", "16", "--test-size", "4", "--fonts", "cybermedium"),
}
_SMOKE_ANSWERS = ("--limit", "2", "--batch-size", "2", "--max-new-tokens", "32")
SMOKE_EVALUATE: Mapping[str, tuple[str, ...]] = {
    "math": (*_SMOKE_ANSWERS, "--samples", "2"),  # not 1: pass@k is part of the road
    "medical": _SMOKE_ANSWERS,
    "figfont": _SMOKE_ANSWERS,
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What one script does. Paths are absolute, and exist but for root, script and config.

    objective: as it was written: it names the files
    folder:    a Hugging Face folder in the place of the model of the Hub, or None
    devices:   CUDA_VISIBLE_DEVICES, or None for what is there
    root:      holds data, base, weights, runs, hf and results
    sources:   in the place of the data set of the Hub
    tests:     files of the evaluation's test sets, in the place of the recipe's
    overrides: KEY=VALUE of the configuration
    """

    recipe_name: str
    dataset: str
    key: str
    objective: str
    processes: int
    devices: str | None
    root: Path
    script: Path
    folder: str | None = None
    sources: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    smoke: bool = False

    @property
    def recipe(self) -> Recipe:
        """The published settings."""
        return RECIPES[self.recipe_name][self.dataset]

    @property
    def config(self) -> Path:
        """The run's configuration, beside the script."""
        return self.script.with_suffix(".yaml")

    @property
    def name(self) -> str:
        """Of the run: its recipe, where that is not the release's own, model and objective."""
        recipe = "" if self.recipe_name == "deft" else f"{self.recipe_name}-"
        own = _mark(self.folder, self.sources, self.overrides, self.smoke)
        return f"{recipe}{self.key}-{file_name(self.objective)}{own}"

    @property
    def data(self) -> str:
        """Folder of the prepared data, below root."""
        return f"data/{self.recipe.folder}{_mark(self.sources, self.smoke)}"

    @property
    def weights(self) -> str:
        """Folder of the imported model, below root."""
        return f"weights/{self.key}{_mark(self.folder)}"

    @property
    def results(self) -> str:
        """Folder of the evaluation, below root."""
        return f"results/{self.dataset}/{self.name}{_mark(self.tests)}"


def _mark(*choices: object) -> str:
    """Tells what was made with choices of one's own from what was not, and from one another.

    Else a step would be left out whose result is there, but is that of another choice.
    """
    if not any(choices):
        return ""
    return f"-{blake2b(repr(choices).encode(), digest_size=4).hexdigest()}"


def file_name(text: str) -> str:
    """The text with every run of characters that a path or a model's name may not have as one _.

    No = is kept, though a path may have it: `evaluate --names` does not take it.
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_")


def configuration(experiment: Experiment) -> dict[str, Any]:
    """The run's configuration, nested as its YAML file is; its paths are below the root."""
    recipe = experiment.recipe
    train, validation = recipe.splits
    keys: dict[str, Any] = {
        "objective": experiment.objective.strip(),
        "run_dir": f"runs/{experiment.dataset}/{experiment.name}",
        "model.load": experiment.weights,
        "model.dtype": "bf16",
        "data.train_files": [f"{experiment.data}/{train}.parquet"],
        "data.val_files": [f"{experiment.data}/{validation}.parquet"],
        **recipe.keys,
        **recipe.models[experiment.key].keys,
        "monitor.project": experiment.dataset,
        "monitor.experiment": experiment.name,
    }
    if experiment.smoke:
        keys |= {**SMOKE, "train.global_batch": experiment.processes}
    nested: dict[str, Any] = {}
    for name, value in keys.items():
        section, _, last = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[last] = value
    return nested


def script(experiment: Experiment, command: Sequence[str]) -> str:
    """The bash script. `command`: what it was asked for with, for its head."""
    steps = [step for step in _steps(experiment) if step[2]]
    body = (_step(number, *step) for number, step in enumerate(steps, 1))
    return _head(experiment, command) + "\n" + "\n".join(body)


def _steps(experiment: Experiment) -> list[tuple[str, str, list[str]]]:
    """Title, what is there when the step is done, and commands, none where it is not needed."""
    key, dataset, name = experiment.key, experiment.dataset, experiment.name
    base = experiment.folder or f"base/{key}"
    weights, results, exported = experiment.weights, experiment.results, f"hf/{dataset}/{name}"
    prompt = experiment.recipe.models[key].prompt_type
    tests = tests_of(experiment) or (f"{experiment.data}/test.parquet",)
    return [
        ("data", f"{experiment.data}/info.json", [
            _command(["megatron-deft", "prepare", dataset, experiment.data],
                     *_by_option(_prepare(experiment))),
        ]),
        ("base model", base, [] if experiment.folder else [
            _command(["hf", "download", MODELS[key], "--exclude", "original/*"],
                     ["--local-dir", f"{base}.partial"]),
            _command(["mv", f"{base}.partial", base]),
        ]),
        ("Hugging Face to Megatron", f"{weights}/megatron_deft.json", [
            _command(["megatron-deft", "convert", "import", base, weights],
                     *([] if experiment.folder else [["--base", MODELS[key]]])),
        ]),
        # the export is made of a run that has ended: where it is, nothing is left to train
        ("training", f"{exported}/config.json", [
            _command(["torchrun", "--standalone", "--nnodes=1",
                      f"--nproc_per_node={experiment.processes}"],
                     ["-m", "megatron_deft.train", str(experiment.config)],
                     ["train.resume=auto", *experiment.overrides]),
        ]),
        ("Megatron to Hugging Face", f"{exported}/config.json", [
            _command(["megatron-deft", "convert", "export", f"runs/{dataset}/{name}", exported]),
        ]),
        ("evaluation", f"{results}/results.json", [
            _command(["megatron-deft", "evaluate", dataset, base, exported],
                     ["--names", f"base,{name}", "--prompt-type", prompt],
                     ["--data", *tests],
                     ["--out", results,
                      *(SMOKE_EVALUATE[dataset] if experiment.smoke else ())]),
        ]),
    ]  # fmt: skip


def tests_of(experiment: Experiment) -> tuple[str, ...]:
    """The files of the evaluation that must be there beforehand."""
    return experiment.tests or tuple(f"data/test/{name}" for name in experiment.recipe.tests)


def _prepare(experiment: Experiment) -> list[str]:
    """Options of `prepare`: the recipe's, or those of the files that stand in for its data."""
    words = list(experiment.recipe.prepare)
    if experiment.sources:
        groups = _by_option(words)
        words = [word for group in groups if group[0] != "--source" for word in group]
        words += ["--source", *experiment.sources]
    return words + list(SMOKE_PREPARE[experiment.dataset] if experiment.smoke else ())


def _by_option(words: Iterable[str]) -> list[list[str]]:
    """The words in groups that begin at each --option."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    return groups


def _command(*lines: Sequence[str]) -> str:
    """A command over several lines."""
    return " \\\n    ".join(" ".join(map(shlex.quote, line)) for line in lines)


def _step(number: int, title: str, made: str, commands: Sequence[str]) -> str:
    body = "\n".join(f"  {line}" for command in commands for line in command.split("\n"))
    what, there = shlex.quote(f"{number}. {title}"), shlex.quote(made)
    return f"step {what}\nif [ -e {there} ]; then\n  skip {there}\nelse\n{body}\nfi\n"


_HEAD = """\
#!/usr/bin/env bash
# {title}
# {source}
#
# Written by:  {command}
#
# Start it as often as needed: a step is left out when what it makes is there, and training goes on
# from its newest checkpoint. The hyper-parameters are in {config}.
set -euo pipefail
cd {root}
{devices}
step() {{ printf '\\n\\033[1m# %s\\033[0m\\n' "$1"; }}
skip() {{ printf '%s is there\\n' "$1"; }}
fail() {{ printf '%s\\n' "$1" >&2; exit 2; }}

command -v megatron-deft > /dev/null ||
  fail 'megatron-deft is not on the PATH: activate its environment'
{checks}"""


def _head(experiment: Experiment, command: Sequence[str]) -> str:
    devices = experiment.devices
    model = experiment.folder or MODELS[experiment.key]
    return _HEAD.format(
        title=_line(f"{experiment.objective} on {experiment.dataset} with {model}"),
        source=SOURCES[experiment.recipe_name],
        command=_line(" ".join(map(shlex.quote, command))),
        config=_line(str(experiment.config)),
        root=shlex.quote(str(experiment.root)),
        devices="" if devices is None else f"export CUDA_VISIBLE_DEVICES={shlex.quote(devices)}\n",
        checks="".join(
            # before anything is trained, not days later
            f"[ -e {shlex.quote(test)} ] || fail {shlex.quote(_missing(test))}\n"
            for test in tests_of(experiment)
        ),
    )


def _line(text: str) -> str:
    """Text for a comment, which must not reach over its line."""
    return " ".join(text.split())


def _missing(test: str) -> str:
    return (
        f"{test}, a test set of the evaluation, is missing: put it there, or write the script anew "
        "with --test_data and files of your own"
    )
