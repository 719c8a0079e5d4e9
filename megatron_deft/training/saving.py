"""Writing a run's checkpoints, by all ranks together: in the background or waited for, one at a
time, and by one way in both cases.

1. Every rank plans its files with megatron-core (dist_checkpointing's torch_dist); in the
   background the tensors are copied to host memory, which no later step can reach.
2. Threads write, sync and hash them.
3. When the files of all ranks are whole, rank 0 gathers what they hold, and a thread of its writes
   the metadata and the manifest, renames the folder and lets `latest` name it.

The ranks speak with one another in the main thread alone, in `poll`, which all of them call at the
same steps: a thread never waits for another rank.

megatron-core's own AsyncCallsQueue was rejected. It forks the training process: the children keep
its sockets open and its signal handlers, and one that is killed leaves its rank waiting for ever.
The other kind, a spawned process, needs a GPU. Both tell of a full disk no more than "Worker
failure", and when rank 0 cannot write the metadata the other ranks are not told at all.
"""

import errno
import io
import queue
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.optimizer import ChainedOptimizer
from torch import Tensor
from torch.distributed.checkpoint.storage import WriteResult

from megatron_deft import checkpoint_folder
from megatron_deft.convert import hf_folder
from megatron_deft.convert.state import BACKENDS, append, save_into
from megatron_deft.convert.streams import Output, nothing_follows, progress_bar
from megatron_deft.data.tokenizer import write_template
from megatron_deft.errors import UserError
from megatron_deft.files import fsync_path, publish_folder, require_space, temporary_beside
from megatron_deft.hashing import hash_files
from megatron_deft.platform import device
from megatron_deft.revision import revision
from megatron_deft.training.checkpointing import Position, state_to_save
from megatron_deft.training.data import on_rank_0

FILES = 2  # that each rank writes at a time, as megatron-core does by default
RECORD_BYTES = 2048  # of the format, at most, around a tensor
ROOM = "free some space, or lower train.keep_checkpoints"
REMEDIES = {
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}
Bucket = tuple[str, str, tuple[list[Any], list[Any]]]  # one file: path, name, byte records, tensors


@dataclass(frozen=True)
class Companions:
    """What lies beside the tensors in a checkpoint.

    hf:       folder with the Hugging Face files beside the weights to carry along
    template: chat template that the tokenizer among them gets, None for its own
    fields:   further entries of the manifest (spec, objective, base, config)
    """

    hf: Path
    template: str | None
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole, on the disk and named by `latest`.

    bytes:   of its tensors, about
    seconds: from the call that began it until it was seen to be whole
    waited:  of these, how long the training stood still
    warning: on rank 0: what went wrong once it was whole, empty for nothing
    """

    folder: Path
    step: int
    bytes: int
    seconds: float
    waited: float
    warning: str


@dataclass
class _Save:
    """One on its way. What is None on the other ranks is rank 0's."""

    step: int
    final: Path
    temporary: Path
    plan: "_Plan"
    manifest: Mapping[str, Any]
    work: list[Future[Any]] = field(default_factory=list)
    bytes: int = 0
    is_gathered: bool = False
    begin: float = field(default_factory=time.perf_counter)
    waited: float = 0.0


class _Plan(TorchDistSaveShardedStrategy):
    """megatron-core's plan of this rank's files, without its processes.

    buckets:  this rank's files
    writer, metadata: what makes `.metadata`; the latter is rank 0's
    common:   what is not sharded, for common.pt
    """

    def __init__(self, state: dict[str, Any], folder: Path) -> None:
        super().__init__(BACKENDS["sharded_backend"], BACKENDS["sharded_backend_version"])
        # Else it starts a server process, which imports torch anew, for results we do not send.
        filesystem_async._results_queue = queue.Queue()
        sharded, self.common = save_preprocess(state)
        self.async_save(sharded, str(folder))
        self.buckets: list[Bucket] = self.writer.write_buckets

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> None:
        self.writer, self.metadata = writer, planned[1]

    def bytes(self) -> int:
        """How much this rank will write, or a little less."""
        records = (record for *_, both in self.buckets for record in chain(*both))
        return sum(_bytes(data) + RECORD_BYTES for _, data in records)

    def detach(self) -> None:
        """Copy to host memory what later steps will change."""
        staged = self.writer.preload_tensors(self.buckets)  # off the GPU; what is on a CPU stays
        self.buckets = [
            (path, name, (records, list(map(_own, tensors, copies))))
            for (path, name, (records, tensors)), (*_, (_, copies)) in zip(
                self.buckets, staged, strict=True
            )
        ]


def _own(before: tuple[Any, Tensor], copy: tuple[Any, Tensor]) -> tuple[Any, Tensor]:
    return copy[0], copy[1].clone() if copy[1] is before[1] else copy[1]


def _bytes(data: Any) -> int:
    return data.getbuffer().nbytes if isinstance(data, io.BytesIO) else int(data.nbytes)


class Saver:
    """Writes the checkpoints of one run; every rank has one and calls it at the same steps.

    Args:
        run_dir: the run's folder, on a file system that all ranks see.
        keep: how many checkpoints to keep, None for all.
    """

    def __init__(self, run_dir: Path, keep: int | None) -> None:
        self._root, self._keep = run_dir / "checkpoints", keep
        self._current: _Save | None = None
        self._seconds: dict[str, float] = {}
        # Waited for when the process ends, however it ends: no thread dies within torch.
        self._threads = ThreadPoolExecutor(FILES + 1, "checkpoint")

    def start(
        self,
        model: Sequence[GPTModel],
        optimizer: ChainedOptimizer,
        position: Position,
        companions: Companions,
        in_background: bool,
    ) -> None:
        """Begin the checkpoint of `position`; `poll` tells when it is there.

        model: this rank's chunks, unwrapped
        in_background: whether the state may change before `poll` has returned the checkpoint
        Errors: UserError, on every rank, when the disk has no room for it.
        """
        assert self._current is None, "one at a time"
        final = self._root / checkpoint_folder.step_name(position.step)
        begin = time.perf_counter()
        temporary = on_rank_0(lambda: _new(final), is_quick=True)
        state, where = state_to_save(model, optimizer, position)
        plan = _Plan(state, temporary / "state")
        manifest = {**where, "revision": revision(), **companions.fields}
        save = _Save(position.step, final, temporary, plan, manifest, begin=begin)
        save.bytes = int(_sums(plan.bytes())[0])
        try:
            on_rank_0(lambda: require_space(final, save.bytes), is_quick=True)
        except UserError as error:
            self._give_up(save, str(error), ROOM)
        if in_background:
            plan.detach()
        else:
            torch.cuda.synchronize()  # threads have streams of their own
        save.work = [self._threads.submit(_write, bucket) for bucket in plan.buckets]
        if dist.get_rank() == 0:
            save.work.append(self._threads.submit(_write_rest, save, companions))
        save.waited = time.perf_counter() - begin
        self._current = save

    def poll(self, wait_for_it: bool, spare: Collection[Path] = ()) -> Saved | None:
        """The checkpoint that has become whole since the last call, if one has.

        wait_for_it: until it is; else nothing is waited for but the other ranks' answer
        spare: checkpoints that must not be removed yet, beside those to keep
        Errors: UserError, on every rank, when one could not write; what was written is removed.
        """
        save = self._current
        if save is None:
            return None
        begin = time.perf_counter()
        while self._is_done(save, wait_for_it):
            if save.is_gathered:
                self._current = None
                warning = next((work.result() for work in save.work), "")
                end = time.perf_counter()
                waited, total = save.waited + end - begin, end - save.begin
                self._seconds |= {"save_seconds": waited, "save_total_seconds": total}
                return Saved(save.final, save.step, save.bytes, total, waited, warning)
            self._gather(save, spare)
        save.waited += time.perf_counter() - begin
        return None

    def take_seconds(self) -> dict[str, float]:
        """What the checkpoint that was finished since the last call took, for the metrics."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _is_done(self, save: _Save, wait_for_it: bool) -> bool:
        """Whether the threads of all ranks have ended. Errors: UserError when one has failed."""
        if wait_for_it:
            wait(save.work)
        ended = [work for work in save.work if work.done()]
        errors = [error for work in ended if (error := work.exception()) is not None]
        running, failed = _sums(len(save.work) - len(ended), len(errors))
        if running:  # also where one has failed: what is written to is not removed
            return False
        if failed:
            causes: list[Any] = [None] * dist.get_world_size()
            mine = [_cause(error, save.temporary) for error in errors]
            dist.all_gather_object(causes, mine)
            self._give_up(save, *next(chain.from_iterable(causes)))
        return True

    def _gather(self, save: _Save, spare: Collection[Path]) -> None:
        """Have rank 0 know what all ranks wrote, and make a checkpoint of it."""
        written = [work.result() for work in save.work]
        box: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(written, box if dist.get_rank() == 0 else None)
        save.is_gathered, save.work = True, []
        if dist.get_rank() == 0:
            parts = list(chain.from_iterable(box))
            save.work = [self._threads.submit(_publish, save, parts, self._keep, spare)]

    def _give_up(self, save: _Save, cause: str, remedy: str) -> None:
        """Remove what there is of it. Errors: always the UserError."""
        self._current = None
        named, _ = checkpoint_folder.named_by_latest(self._root)
        newest = "none" if named is None else named.name
        dist.barrier()  # everybody has read it
        if dist.get_rank() == 0:
            shutil.rmtree(save.temporary, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {save.step} ({save.bytes / 1e9:.3f} GB) could not be "
            f"written: {cause}; the newest is {newest}: {remedy}, then go on with --resume"
        )


def _new(final: Path) -> Path:
    """A folder under a temporary name; all else happens in it."""
    temporary = temporary_beside(final)
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "state").mkdir(parents=True)
    return temporary


def _sums(*values: int) -> list[int]:
    """The sum of each value over all ranks."""
    numbers = torch.tensor(values, dtype=torch.int64, device=device())
    dist.all_reduce(numbers)
    return [int(number) for number in numbers.tolist()]


@dataclass(frozen=True)
class _Written:
    """Files that are on the disk: the records in them, and their entries of the manifest."""

    records: list[WriteResult]
    files: dict[str, dict[str, Any]]


def _write(bucket: Bucket) -> _Written:
    """One file of tensors, synced by the rank that wrote it: another machine could not."""
    path, _, records = bucket
    with Output(Path(path), nothing_follows, progress_bar("", 0, shown=False)) as output:
        # tensors that are still on a GPU come one at a time
        written = [
            append(output, item.index, data.cpu() if isinstance(data, Tensor) else data)
            for item, data in chain(*records)
        ]
    fsync_path(output.path)
    return _Written(written, _hashes(output.path.parents[1], [output.path]))


def _write_rest(save: _Save, companions: Companions) -> _Written:
    """What is there once, without what says that the checkpoint is whole."""
    hf_folder.copy_companions(companions.hf, save.temporary / "hf")
    if companions.template is not None:
        write_template(save.temporary / "hf", companions.template)
    path = save.temporary / "state" / "common.pt"
    with Output(path, nothing_follows, progress_bar("", 0, shown=False)) as output:
        save_into(output, save.plan.common)
    beside = (p for p in (save.temporary / "hf").rglob("*") if p.is_file())
    return _Written([], _hashes(save.temporary, [path, *beside]))


def _publish(
    save: _Save, parts: Sequence[_Written], keep: int | None, spare: Collection[Path]
) -> str:
    """Give the finished folder its metadata, manifest and name; publish_folder syncs them all.

    returns: a warning when older checkpoints could not be removed, else nothing
    """
    state = save.temporary / "state"
    save.plan.writer.finish(save.plan.metadata, [part.records for part in parts])
    save_config(CheckpointingConfig(save.plan.backend, save.plan.version), str(state))
    files = _hashes(save.temporary, [state / ".metadata", state / "metadata.json"])
    for part in parts:
        files |= part.files
    checkpoint_folder.write_manifest(
        save.temporary, kind="training", step=save.step, files=files, **save.manifest
    )
    publish_folder(save.temporary, save.final, overwrite=True)
    checkpoint_folder.write_latest(save.final.parent, save.final.name)
    try:
        checkpoint_folder.drop_oldest(save.final.parent, save.final, keep, spare)
    except OSError as error:
        # someone reads it over a network file system; the next save tries again
        return f"what train.keep_checkpoints drops could not be removed: {error}"
    return ""


def _hashes(folder: Path, paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    names = [path.relative_to(folder).as_posix() for path in paths]
    return hash_files(folder, names)


def _cause(error: BaseException, folder: Path) -> tuple[str, str]:
    """What went wrong on this rank, where and why, and what helps; in parts of a line."""
    if isinstance(error, OSError) and error.strerror:
        path = error.filename2 or error.filename or folder
        why = f"could not write {path}: {error.strerror}, {_free(folder)}"
        return f"rank {dist.get_rank()} {why}", REMEDIES.get(error.errno or 0, "mend that")
    why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return f"rank {dist.get_rank()}: {why}", "mend that"


def _free(folder: Path) -> str:
    return f"with {shutil.disk_usage(folder.parent).free / 1e9:.3f} GB of its disk free"


def little_room(root: Path, needed: int) -> str:
    """A warning when the disk has no room for another checkpoint of `needed` bytes; else empty."""
    disk = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    if free >= needed:
        return ""
    return (
        f"the next checkpoint needs about {needed / 1e9:.2f} GB and the disk of {root} has "
        f"{free / 1e9:.2f} GB left: {ROOM}, while there is time"
    )
