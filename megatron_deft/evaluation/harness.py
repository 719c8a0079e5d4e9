"""lm-eval as a library: its tasks by name or from YAML files, and one model's scores on them.

Rejected: its command line, which loads tasks after the model, fails with tracebacks, and draws its
bars into log files; and its `simple_evaluate`, which looks the model up on the Hub and describes
the machine at length each time. What the latter sets before it evaluates is set here.
"""

import contextlib
import difflib
import gc
import json
import logging
import math
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib import import_module, metadata
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megatron_deft.errors import UserError
from megatron_deft.evaluation import engines
from megatron_deft.evaluation.engines import engine_name
from megatron_deft.evaluation.folder import load_tokenizer

# What is taken as a task's main metric where it has it, in this order; else the first it has.
MAIN_METRICS = ("acc_norm", "acc", "exact_match")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_NEEDED = ("lm_eval", "accelerate")
_MODELS = {"transformers": "hf", "vllm": "vllm"}  # our names of the engines -> lm-eval's
_RESAMPLES = 2000  # for the errors that lm-eval can only resample
_OWN_RESAMPLES = 200  # for those that it has none of
_SEED, _FEWSHOT_SEED = 0, 1234  # lm-eval's own
_REASON_LENGTH = 200
_NETWORK = re.compile(r"Connect|Offline|Timeout|Http|HTTP|NotFoundError|Proxy|\bHub\b")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class TaskSet:
    """A task, or a group of tasks with a mean of its own.

    loaded: what lm-eval's TaskManager.load returns of it. digest: of the tasks' configuration and
    of the questions they will ask.
    """

    name: str
    loaded: Mapping[str, Any]
    digest: str


def check_installed() -> None:
    """Errors: UserError when lm-eval, or what it needs for our models, cannot be imported."""
    try:
        for package in _NEEDED:
            import_module(package)
    except ImportError as error:
        raise UserError(
            f"evaluate general needs lm-eval ({error}): pip install 'megatron-deft[general]'"
        ) from error
    found = metadata.version("datasets")
    if int(found.split(".")[0]) < 4:  # they run the scripts of a data set, if its task says so
        raise UserError(
            f"evaluate general: datasets {found} may run code of a data set: "
            "pip install 'datasets>=4'"
        )


@contextlib.contextmanager
def calm(bars: bool) -> Iterator[None]:
    """Keep lm-eval's output off stdout and out of log files: bars only, and only on a terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    with contextlib.ExitStack() as stack:
        for logger, level in zip(loggers, levels, strict=True):
            stack.callback(logger.setLevel, level)
            logger.setLevel(logging.ERROR)
        if not (bars and sys.stderr.isatty()):
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def load_tasks(
    names: Sequence[str],
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> tuple[list[TaskSet], list[str]]:
    """The sets of scores that `names` ask for, with their data, and the names of those tasks that
    keep the 0 examples that their authors fixed although `num_fewshot` asks for others.

    names: tasks, groups, tags or patterns (mmlu_*) that lm-eval knows, among them those in YAML
    files under `include_path`, or such files. A group without a mean of its own (and a tag) stands
    for its members. limit: how many questions of each task will be asked.

    Errors: UserError for a name that is none, a task named twice, one that cannot be loaded
    (its data or a package is missing, no network), or that runs code or reads images.
    """
    manager = _manager(names, include_path)
    sets: dict[str, TaskSet] = {}
    fixed: list[str] = []
    for name in _known(manager, names, include_path):
        for item in _parts(_load(manager, name)):
            loaded = manager.load([item])
            for task_name, task in loaded["tasks"].items():
                _check(task_name, task)
                if _set_fewshot(task, num_fewshot):
                    fixed.append(task_name)
            each = getattr(item, "task_name", None) or item.name
            sets[each] = TaskSet(each, loaded, _digest(loaded["tasks"], limit))
    if not sets:
        raise UserError("no task to evaluate on: name at least one, such as mmlu")
    seen: dict[str, str] = {}
    for each in sets.values():
        for task_name in each.loaded["tasks"]:
            if task_name in seen:
                raise UserError(
                    f"task {task_name} is asked for twice, by {seen[task_name]} and by "
                    f"{each.name}: name one of them"
                )
            seen[task_name] = each.name
    return list(sets.values()), fixed


def load_model(engine: str, folder: Path, batch_size: int, dtype: str) -> Any:
    """lm-eval's model of a Hugging Face folder. dtype: as of engines.make_engine.

    Errors: UserError when vLLM is asked for and absent, or transformers cannot load the folder.
    """
    from lm_eval.api.registry import get_model

    kind = engine_name(engine)
    if kind == "transformers":
        model = engines.load_model(folder, dtype)
        tokenizer = load_tokenizer(folder)
        return get_model(_MODELS[kind])(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal"
        )
    where = str(folder.resolve())  # a relative one could be a name on the Hub, and be looked up
    options = {"dtype": DTYPES.get(dtype, "auto"), "batch_size": "auto", "seed": _SEED}
    try:
        return get_model(_MODELS[kind])(pretrained=where, trust_remote_code=False, **options)
    except ModuleNotFoundError as error:
        raise UserError(f"engine {kind}: {error}: install it, or pass another --engine") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {kind} cannot load it: {_reason(error)}") from error


def free() -> None:
    """Give back the memory of a model that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(
    model: Any, tasks: TaskSet, limit: int | None = None, apply_chat_template: bool = False
) -> dict[str, Any]:
    """One model's scores on one set, as JSON.

    metric: the main metric (lm-eval's name, with its filter if that has one); mean; stderr: of the
    mean, None where lm-eval has none; values: of each question, such that their mean is `mean`, or
    None where the metric is no mean; fraction: whether it lies between 0 and 1; higher_is_better;
    samples: questions asked; fewshot; version; all: every metric of lm-eval.
    """
    from lm_eval.evaluator import evaluate

    random.seed(_SEED)
    np.random.seed(_FEWSHOT_SEED)
    torch.manual_seed(_FEWSHOT_SEED)
    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    found = evaluate(
        lm=model,
        task_dict=tasks.loaded,
        limit=limit,
        log_samples=True,
        bootstrap_iters=_RESAMPLES,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=True,
    )
    if found is None:
        raise UserError("evaluate general is one process: start it without torchrun")
    entry = found["results"][tasks.name]
    numbers = {key: float(value) for key, value in entry.items() if _is_score(key, value)}
    key = _main_metric(tasks.name, numbers)
    metric, _, kind = key.partition(",")
    rows = [
        [row for row in found["samples"][name] if row["filter"] == kind]
        for name in tasks.loaded["tasks"]
    ]
    values, fraction = _values(rows, metric, numbers[key])
    stderr = entry.get(f"{metric}_stderr,{kind}")
    if not isinstance(stderr, Real) and len(rows) == 1:
        (task,) = tasks.loaded["tasks"].values()
        stderr = _resampled_error(task.aggregation().get(metric), [row[metric] for row in rows[0]])
    return {
        "metric": key.removesuffix(",none"),
        "mean": numbers[key],
        "stderr": float(stderr) if isinstance(stderr, Real) else None,
        "values": values,
        "fraction": fraction,
        "higher_is_better": found["higher_is_better"].get(tasks.name, {}).get(metric) is not False,
        "samples": int(entry["sample_len"]),
        "fewshot": found["n-shot"].get(tasks.name),
        "version": found["versions"].get(tasks.name),
        "all": numbers,
    }


def _manager(names: Sequence[str], include_path: str | Path | None) -> Any:
    """lm-eval's list of tasks; of the folder's alone where that is enough.

    For lm-eval reads its own 14,000 files each time, which takes seconds.
    """
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    if not Path(include_path).is_dir():
        raise UserError(f"include_path={include_path}: no such folder: name one of task YAML files")
    local = TaskManager(include_path=include_path, include_defaults=False)
    index = local.task_index
    members = [
        member.get("task") if isinstance(member, Mapping) else member
        for entry in index.values()
        if entry.cfg and "group" in entry.cfg
        for member in entry.cfg.get("task") or ()
    ]
    if all(name in index or _is_file(name) for name in names) and all(
        isinstance(member, str) and member in index for member in members
    ):
        return local
    return TaskManager(include_path=include_path)


def _is_file(name: str) -> bool:
    return Path(name).suffix == ".yaml" and Path(name).is_file()


def _known(manager: Any, names: Sequence[str], include_path: str | Path | None) -> list[str]:
    """The names, and those that the patterns among them fit."""
    known: list[str] = []
    unknown: list[str] = []
    for name in names:
        direct = name in manager.task_index or _is_file(name)
        found = [name] if direct else manager.match_tasks([name])
        known += found
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            unknown.append(f"{name} (did you mean {', '.join(near)}?)" if near else name)
    if unknown:
        raise UserError(
            f"lm-eval knows no task {', '.join(unknown)}{_torn(include_path)}: `lm-eval ls tasks` "
            "lists all"
        )
    return list(dict.fromkeys(known))


def _torn(include_path: str | Path | None) -> str:
    """What is wrong with the first YAML file that is none: lm-eval passes over them silently."""
    for file in sorted(Path(include_path).rglob("*.yaml")) if include_path else ():
        try:
            yaml.compose(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            return f"; {file} is not readable YAML ({_reason(error)})"
    return ""


def _load(manager: Any, name: str) -> list[Any]:
    """The task, the group or the members of the tag of that name, with their data."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # a task is a program: it may fail in any way
        raise UserError(f"task {name}: lm-eval cannot load it: {_reason(error)}") from error
    groups = list(loaded["groups"].values())
    return groups[:1] or list(loaded["tasks"].values())  # a group comes before its members


def _parts(items: Sequence[Any]) -> Iterator[Any]:
    """Tasks, and groups with a mean of their own."""
    for item in items:
        if getattr(item, "has_aggregation", True):
            yield item
        else:
            yield from _parts(list(item))


def _check(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"task {name} runs the code that a model writes: it is not run here: use lm-eval's own "
            "command with --confirm_run_unsafe_code in a sandbox"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name} shows images or sounds, which these models do not read")


def _set_fewshot(task: Any, number: int | None) -> bool:
    """Set how many examples come before a question; whether the task's own 0 stands against it."""
    fixed = task.get_config("num_fewshot")
    if number is not None and fixed != 0:
        task.set_config(key="num_fewshot", value=number)
    elif fixed is None:
        task.set_config(key="num_fewshot", value=0)
    return fixed == 0 and bool(number)


def _digest(tasks: Mapping[str, Any], limit: int | None) -> str:
    state = blake2b(digest_size=16)
    for name, task in tasks.items():
        for part in (name, task.dump_config(), *islice(task.eval_docs, limit)):
            text = json.dumps(part, sort_keys=True, default=lambda value: type(value).__name__)
            state.update(_ADDRESS.sub("", text).encode())
    return state.hexdigest()


def _is_score(key: str, value: Any) -> bool:
    return "," in key and "_stderr," not in key and isinstance(value, Real)


def _main_metric(name: str, numbers: Mapping[str, float]) -> str:
    ranked = sorted(
        numbers,
        key=lambda key: (*MAIN_METRICS, key.partition(",")[0]).index(key.partition(",")[0]),
    )
    if not ranked:
        raise UserError(f"task {name}: lm-eval gives no score for it: leave it out")
    return ranked[0]


def _values(
    tasks: Sequence[Sequence[Mapping[str, Any]]], metric: str, mean: float
) -> tuple[list[float] | None, bool]:
    """The questions' values, and whether the metric is a fraction.

    The mean over a group's tasks may count questions alike or tasks alike; in the second case the
    questions' values are scaled such that their mean is it.
    """
    try:
        parts = [[float(row[metric]) for row in rows] for rows in tasks]
    except (KeyError, TypeError, ValueError):  # pairs of numbers, or not every question has one
        return None, 0 <= mean <= 1
    count = sum(map(len, parts))
    alike = [value for part in parts for value in part]
    scaled = [value * count / len(parts) / len(part) for part in parts for value in part]
    fraction = all(0 <= value <= 1 for value in alike)
    for values in (alike, scaled):
        if math.isclose(sum(values) / count, mean, abs_tol=1e-9):
            return values, fraction
    return None, 0 <= mean <= 1


def _resampled_error(aggregate: Any, items: Sequence[Any]) -> float | None:
    """The standard error of what a task makes of its questions' results, such as a perplexity."""
    if aggregate is None or len(items) < 2:
        return None
    generator = np.random.default_rng(_SEED)
    picks = generator.integers(len(items), size=(_OWN_RESAMPLES, len(items)))
    return float(np.std([aggregate([items[i] for i in pick]) for pick in picks], ddof=1))


def _reason(error: BaseException) -> str:
    """An error on one line of bounded length, with a remedy where we know one."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= _REASON_LENGTH else text[:_REASON_LENGTH] + "..."
    if any(_NETWORK.search(f"{type(each).__name__} {each}") for each in chain):
        return (
            f"{text}: its data are not in the cache and there is no network: run it once with one, "
            "or let HF_HOME name a cache that has them"
        )
    if isinstance(error, ImportError):
        return f"{text}: install that package; lm-eval's extras, as lm-eval[ifeval], have them"
    return text
