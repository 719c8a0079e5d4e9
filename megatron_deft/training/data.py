"""What a run trains and validates on: prepared sets, made first where the run names plain files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_deft.config import RunConfig
from megatron_deft.data.check import check_sets
from megatron_deft.data.indexed import TokenSet, open_set, require_whole
from megatron_deft.data.loader import Share
from megatron_deft.data.manifest import TOKENS
from megatron_deft.data.mixture import Rows, SampleRows
from megatron_deft.data.prepare.tokenise import RowSettings, prepare_set
from megatron_deft.data.pretraining import TextRows
from megatron_deft.data.sampler import Blend, Indices, Stream, steps
from megatron_deft.errors import UserError
from megatron_deft.processes import available_cores
from megatron_deft.training.preemption import Stopped, stoppable
from megatron_deft.training.schedule import warmup_length

Built = TypeVar("Built")


@dataclass(frozen=True)
class Data:
    """The run's rows and the order they come in.

    val_rows: how many of `val` count, in order; notes: lines for the log
    """

    train: Rows
    val: Rows | None
    stream: Stream | Blend
    total_steps: int
    notes: tuple[str, ...]
    val_rows: int = 0

    def batches(self, consumed: int, global_batch: int) -> Iterator[Indices]:
        """The global batches that follow the first `consumed` rows, without end."""
        for start in count(consumed, global_batch):
            yield self.stream.take(start, global_batch)


def open_data(cfg: RunConfig, tokenizer: Any, folder: Path) -> Data:
    """Open what cfg.data names; plain files are tokenised first, by rank 0, into run_dir/data.

    tokenizer: the model's, with the chat template of cfg.data; folder: where it was read
    Errors: UserError, on every rank, for data that cannot be read or are not the model's.
    """
    data = cfg.data
    train_sets, notes = data.train_sets, []
    if data.train_files:
        train_sets = (_tokenise(cfg, "train", data.train_files, None, folder),)
    val_sets = data.val_sets
    if data.val_files:
        val_sets = (_tokenise(cfg, "val", data.val_files, data.val_max_samples, folder),)
    train, val = _open(cfg, train_sets, tokenizer, "train_sets"), None
    if data.split is not None:
        val = _open(cfg, train_sets, tokenizer, "train_sets", validating=True)
    elif val_sets:
        val = _open(cfg, val_sets, tokenizer, "val_sets", validating=True)
    for name, rows in (("training", train), ("validation", val)):
        if rows is not None:
            notes += [f"{name} data {line}" for line in rows.describe()]
    stream = _stream(cfg, train.sizes)
    total = cfg.train.steps
    if total is None:
        assert cfg.train.epochs is not None
        total = steps(stream, cfg.train.epochs, cfg.train.global_batch)
    warmup_length(cfg.optim, total)  # refuse an impossible schedule before the first step
    val_rows = sum(val.sizes) if val is not None else 0
    if data.val_max_samples is not None:
        val_rows = min(val_rows, data.val_max_samples)
    return Data(train, val, stream, total, tuple(notes), val_rows)


def share_of_rank(cfg: RunConfig, rows: Rows) -> Share:
    """This rank's part of every global batch."""
    parallel = cfg.parallel
    return Share(
        rank=parallel_state.get_data_parallel_rank(),
        size=parallel_state.get_data_parallel_world_size(),
        micro_batch=cfg.train.micro_batch,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel.context,
        multiple=parallel.tensor if parallel.sequence else 1,
        packed=rows.packed,
    )


def _stream(cfg: RunConfig, sizes: Sequence[int]) -> Stream | Blend:
    """The order of rows: of all sets as one, or of each set by itself where they have weights."""
    data = cfg.data
    if not data.train_weights:
        return Stream(sum(sizes), cfg.seed, data.shuffle)
    # seeds apart, or sets of one size would come in one order
    streams = tuple(Stream(n, cfg.seed + i, data.shuffle) for i, n in enumerate(sizes))
    return Blend(streams, data.train_weights)


def _open(
    cfg: RunConfig, sets: Sequence[str], tokenizer: Any, key: str, validating: bool = False
) -> SampleRows | TextRows:
    if check_sets(cfg.data, key, sets) == "pretrain":
        return _open_text(cfg, sets, tokenizer, validating)
    opened = [_open_whole(one, tokenizer) for one in sets]
    data, limit = cfg.data, cfg.data.val_max_samples if validating else None
    return SampleRows(
        opened, data.max_length, data.pack, cfg.parallel.context, cfg.seed, limit=limit
    )


def _open_whole(path: str, tokenizer: Any) -> TokenSet:
    """A prepared set whose files are those it was made with; rank 0 looks for all."""
    found = open_set(path, tokenizer)
    on_rank_0(lambda: require_whole(found), is_quick=True)
    return found


def _open_text(cfg: RunConfig, sets: Sequence[str], tokenizer: Any, validating: bool) -> TextRows:
    prefixes = []
    for one in sets:
        if Path(one).is_dir():
            _open_whole(one, tokenizer)
            one = str(Path(one) / Path(TOKENS).stem)
        prefixes.append(one)
    share = (0.0, 1.0)
    if cfg.data.split is not None:
        border = cfg.data.split[0] / sum(cfg.data.split)
        share = (border, 1.0) if validating else (0.0, border)
    cache = Path(cfg.run_dir) / "data" / "index"
    size = cfg.data.max_length
    return TextRows(prefixes, size, share, cache, cfg.seed, len(tokenizer), _rank_0_first)


def _tokenise(
    cfg: RunConfig, name: str, files: Sequence[str], limit: int | None, folder: Path
) -> str:
    """The set made of plain files; one made by an earlier start of the run is used again."""
    data = cfg.data
    own = {field.name for field in fields(RowSettings)}
    same = {field.name: getattr(data, field.name) for field in fields(data) if field.name in own}
    settings = RowSettings(**same, limit=limit)
    out = Path(cfg.run_dir) / "data" / name

    def make() -> str:
        workers = data.prepare_workers or available_cores()
        print(f"{name}: {', '.join(files)} as tokens in {out}", flush=True)
        prepare_set(out, files, folder, settings, workers=workers, reuse=True)
        return str(out)

    return on_rank_0(make)


def on_rank_0(make: Callable[[], Built], is_quick: bool = False) -> Built:
    """What rank 0 makes, on every rank; its error too, if it is one that ends in a line.

    is_quick: what is left to end; else a signal to stop breaks it off, with Stopped on every rank
    """
    answer: list[Any] = [None, None]
    # Tokenising may take longer than other collectives may.
    group = None if is_quick else dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if dist.get_rank() == 0:
        try:
            with nullcontext() if is_quick else stoppable():
                answer[0] = make()
        except (UserError, OSError, Stopped) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, group=group)
    if group is not None:
        dist.destroy_process_group(group)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]  # type: ignore[no-any-return]


def _rank_0_first(build: Callable[[], Built]) -> Built:
    """Build on rank 0, which leaves files that spare the others the work, then on all others."""
    if dist.get_rank() == 0:
        built: list[Built] = []
        on_rank_0(lambda: built.append(build()))
        return built[0]
    on_rank_0(build)
    return build()
