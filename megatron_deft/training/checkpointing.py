"""Training checkpoints: model, optimizer, random generators and data position.

RUN/checkpoints/step_00000020/ (see checkpoint_folder) is found, checked and loaded here; `saving`
writes it. The learning rate needs no state: it is a pure function of the step.
"""

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
import torch.distributed as dist
import yaml
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_deft import checkpoint_folder
from megatron_deft.config import RunConfig
from megatron_deft.config.stages import COUNTED, GIVEN
from megatron_deft.convert.state import load_state
from megatron_deft.errors import UserError
from megatron_deft.models.adapters import adapters_alone
from megatron_deft.models.families import ModelSpec
from megatron_deft.models.heads import chunk_state
from megatron_deft.training.data import on_rank_0
from megatron_deft.training.exports import FOLDER as EXPORTS
from megatron_deft.training.metrics import step_of
from megatron_deft.training.optimizer import restore, sharded_state, steps
from megatron_deft.training.restarts import Attempt

METRICS, CONFIG = "metrics.jsonl", "config.yaml"
Found = TypeVar("Found")


@dataclass(frozen=True)
class Position:
    """Where a run stands: steps done, samples consumed, and how many of the steps changed nothing,
    for their loss or gradient was not finite."""

    step: int = 0
    consumed: int = 0
    skipped: int = 0

    @property
    def updates(self) -> int:
        """Steps of the optimizer."""
        return self.step - self.skipped


def _layout() -> dict[str, int]:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    }


def _draws(layout: Mapping[str, int], parallel: Mapping[str, Any]) -> list[Any]:
    """Of a layout and the parallel section of a configuration, what random numbers depend on.

    Data-parallel ranks draw alike, unless tensor ranks are spread over experts.
    """
    names = ["tensor", "pipeline", "virtual", "expert"]
    spread = layout.get("expert_tensor", layout["tensor"])
    if spread != layout["tensor"]:
        names.append("data")
    stages = (*COUNTED, *GIVEN)
    return [spread, *(layout.get(n, 1) for n in names), *(parallel.get(n) or 0 for n in stages)]


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def _rng_object(data: Any) -> ShardedObject:
    """One entry per pipeline stage, tensor and expert rank; other data-parallel ranks draw alike.

    Tensor and expert ranks are numbered together: without expert ranks the entries are the same as
    in checkpoints from before there were any. Where experts are not shared as matrices are, every
    rank has its own.
    """
    layout, tensor = _layout(), parallel_state.get_tensor_model_parallel_rank()
    if layout["expert_tensor"] != layout["tensor"]:
        return ShardedObject("rng_state", data, (dist.get_world_size(),), (dist.get_rank(),))
    expert = parallel_state.get_expert_model_parallel_rank()
    return ShardedObject(
        "rng_state",
        data,
        (layout["pipeline"], layout["tensor"] * layout["expert"]),
        (
            parallel_state.get_pipeline_model_parallel_rank(),
            tensor * layout["expert"] + expert,
        ),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True)
        // layout["expert"],
    )


def state_to_save(
    model: Sequence[GPTModel], optimizer: ChainedOptimizer, position: Position
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sharded state of `position` for dist_checkpointing, which refers to the live tensors,
    and the manifest's entries of it.

    model: this rank's chunks, unwrapped
    """
    assert steps(optimizer) <= {position.updates}, f"{steps(optimizer)} steps at {position}"
    state = _model_state(model)
    state |= {"optimizer": sharded_state(optimizer, state), "rng": _rng_object(_rng_state())}
    entries = {"consumed": position.consumed, "skipped": position.skipped, "layout": _layout()}
    # A stage may train nothing, and an empty entry is to megatron-core a difference between ranks.
    return {name: part for name, part in state.items() if part}, entries


def _from_rank_0(look: Callable[[], Found]) -> Found:
    """What rank 0 finds, on every rank: another machine may see a folder as it was a moment ago."""
    return on_rank_0(look, is_quick=True)


def _model_state(model: Sequence[GPTModel]) -> dict[str, Any]:
    """The parameters that are trained: all, or adapters alone, which a chunk may have none of."""
    states = {}
    for number, chunk in enumerate(model):
        is_whole = all(parameter.requires_grad for parameter in chunk.parameters())
        state = chunk_state(chunk)
        states[f"model{number}"] = state if is_whole else adapters_alone(state)
    return states


def find(attempt: Attempt, asked: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from (None: start at step 0) and warnings to show.

    Rank 0 lists what is there; all ranks together read and compare the checksums.

    asked: train.resume: "no", "auto", "must" or a folder
    Errors: UserError (on every rank) when there is none and there must be, when a named one is
    damaged, or when "no" or a folder of another run would overwrite a run.
    """
    run_dir, resume = attempt.run_dir, attempt.resume(asked)
    if resume not in ("no", "auto", "must"):
        folder = checkpoint_folder.resolve(resume)
        # an attempt before this one may have left its metrics
        if attempt.number == 1 and _from_rank_0(lambda: _mixes_runs(run_dir, folder)):
            raise UserError(
                f"train.resume={resume} is of another run, and run_dir={run_dir} holds checkpoints "
                "or metrics of its own: choose another run_dir, or go on there with --resume"
            )
        check(folder, "train.resume")
        return folder, []
    candidates, skipped = _from_rank_0(lambda: checkpoint_folder.candidates(run_dir))
    newest = None
    for path in candidates:
        problems = _problems(path)
        if not problems:
            newest = path
            break
        skipped.append((path, "; ".join(problems)))
    if resume == "no":
        if newest is not None:
            raise UserError(
                f"run_dir={run_dir} holds checkpoints up to {newest.name}: pass --resume to go on "
                "from there, or choose another run_dir"
            )
        if _from_rank_0(lambda: _has_metrics(run_dir)):
            raise UserError(
                f"run_dir={run_dir} holds the metrics of another run: choose another run_dir, or "
                f"remove {run_dir / METRICS}"
            )
        return None, []
    if newest is None and resume == "must":
        why = f" ({skipped[0][0].name}: {skipped[0][1]})" if skipped else ""
        raise UserError(
            f"train.resume=must, but {run_dir}/checkpoints holds no whole checkpoint{why}: check "
            "run_dir, or pass train.resume=auto to start at step 0"
        )
    if newest is not None:
        _refuse_strays(newest)
    used = f"going on from {newest.name}" if newest else "starting at step 0"
    return newest, [f"{path} is passed over ({why}); {used}" for path, why in skipped]


def _has_metrics(run_dir: Path) -> bool:
    metrics = run_dir / METRICS
    return metrics.is_file() and metrics.stat().st_size > 0


def _mixes_runs(run_dir: Path, folder: Path) -> bool:
    """Whether going on from `folder` in run_dir would leave two runs in one folder."""
    if folder.resolve().parent == (run_dir / "checkpoints").resolve():
        return False
    if checkpoint_folder.candidates(run_dir)[0]:
        return True
    return _has_metrics(run_dir) and not _began_at(run_dir, folder)


def _began_at(run_dir: Path, folder: Path) -> bool:
    """Whether a run without a checkpoint of its own went on from `folder`, too: what it logged
    died with it, and the same command begins it again."""
    try:
        config = yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8"))
        begun = checkpoint_folder.resolve(config["train"]["resume"])
        with open(run_dir / METRICS, encoding="utf-8", errors="replace") as lines:
            first = step_of(next(lines))
    except (OSError, UserError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return False
    step: int = checkpoint_folder.read_manifest(folder)["step"]
    return begun.resolve() == folder.resolve() and first > step


def check(folder: Path, key: str) -> None:
    """Refuse a damaged folder by name, and one that was added to.

    Every rank calls it and reads its share of the files.
    """
    if problems := _problems(folder):
        raise UserError(
            f"{key}={folder} is damaged: {'; '.join(problems)}; write it again, or name another"
        )
    _refuse_strays(folder)


def _refuse_strays(folder: Path) -> None:
    if found := _from_rank_0(lambda: checkpoint_folder.strays(folder)):
        raise UserError(found[0])


def _problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, the same on every rank; each rank hashes its share."""
    problems = _from_rank_0(lambda: checkpoint_folder.verify(folder, checksums=False))
    if problems:
        return problems
    share = slice(dist.get_rank(), None, dist.get_world_size())
    wrong: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(wrong, checkpoint_folder.verify(folder, checksums=share))
    return list(dict.fromkeys(chain.from_iterable(wrong)))


def load(
    cfg: RunConfig,
    spec: ModelSpec,
    folder: Path,
    model: Sequence[GPTModel],
    optimizer: ChainedOptimizer,
) -> tuple[Position, dict[str, Any], list[str]]:
    """Load `folder` into the model and optimizer of this rank, whatever layout wrote it.

    returns: where that run stood, its manifest, and notes for the log
    """
    manifest = checkpoint_folder.read_manifest(folder)
    if manifest["kind"] != "training":
        raise UserError(
            f"{folder} holds weights without optimizer state: name it as model.load, and start "
            "without --resume"
        )
    saved = manifest["config"]["parallel"]["distributed_optimizer"]
    if ModelSpec.from_json(manifest["spec"]) != spec:
        raise UserError(
            f"model {cfg.model.load or cfg.model.hf} is another architecture than {folder} was "
            "trained with: name the one that run started from"
        )
    if saved != cfg.parallel.distributed_optimizer:
        raise UserError(
            f"parallel.distributed_optimizer={cfg.parallel.distributed_optimizer}, but {folder} "
            f"was saved with {saved}: set it so, or start anew from its weights with model.load"
        )
    heads = manifest["config"]["model"].get("mtp_layers", 0)
    if heads != cfg.model.mtp_layers:
        raise UserError(
            f"model.mtp_layers={cfg.model.mtp_layers}, but {folder} was saved with {heads}: set it "
            "so, or start anew from its weights with model.load"
        )
    state = _model_state(model)
    # Under a key that no checkpoint has: what older ones hold of parameter groups stays apart.
    state["restored"] = sharded_state(optimizer, state, is_loading=True)
    notes: list[str] = []
    before = _draws(manifest["layout"], manifest["config"]["parallel"])
    same = before == _draws(_layout(), vars(cfg.parallel))
    if same:
        state["rng"] = _rng_object(None)
    else:
        notes.append(
            f"resumed at another layout than {manifest['layout']}: weights, optimizer and data "
            "position are exact, dropout draws anew"
        )
    with torch.no_grad():
        loaded = load_state(state, folder / "state")
    for number, chunk in enumerate(model):
        found = loaded.get(f"model{number}", {})
        chunk.load_state_dict(found, strict=cfg.lora.rank is None)
    position = Position(manifest["step"], manifest["consumed"], manifest.get("skipped") or 0)
    restore(optimizer, loaded.get("restored", {}), position.updates)
    if same:
        _set_rng_state(loaded["rng"])
    return position, manifest, notes


def clear_the_way(run_dir: Path, position: Position) -> list[str]:
    """Make run_dir ready to go on from `position`; rank 0 calls it at the start of a run.

    What interrupted saves left under temporary names is deleted. Checkpoints of later steps
    (damaged ones that were passed over, or another way the run went before) and their exports are
    renamed to step_N.abandoned: nobody must take them for this run's newest.
    returns: lines for the log
    """
    root = run_dir / "checkpoints"
    for path in root.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
    notes = [
        note
        for folder in (root, run_dir / EXPORTS)
        for note in checkpoint_folder.set_aside(folder, position.step)
    ]
    own = root / checkpoint_folder.step_name(position.step)
    if own.exists():
        checkpoint_folder.write_latest(root, own.name)
    else:
        (root / checkpoint_folder.LATEST).unlink(missing_ok=True)
    return notes
