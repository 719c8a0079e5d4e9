"""From rows to the micro-batches of each step that one rank computes."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_deft.data.batches import Batch, collate
from megatron_deft.data.mixture import Rows
from megatron_deft.data.sampler import FILLER, Indices, rank_share
from megatron_deft.errors import UserError
from megatron_deft.processes import outlive_signals

LENGTH_MULTIPLE = 8  # batches are padded to a multiple of this: what GPUs' matrix units want


@dataclass(frozen=True)
class Share:
    """One rank's part of every global batch.

    rank, size: of the data-parallel group; micro_batch: rows in one forward pass
    context_rank, context_size: of the group that shares each row
    multiple: what the length of a row has to be a multiple of, for the tensor-parallel group
    packed: whether rows hold several documents
    """

    rank: int
    size: int
    micro_batch: int
    context_rank: int
    context_size: int
    multiple: int
    packed: bool


class Step(NamedTuple):
    """What one rank computes of one global batch.

    batches: its micro-batches, on the CPU
    length: positions of each row, over all context-parallel ranks; the same on every rank
    tokens: positions of the whole global batch that are not padding
    lengths: positions of each of its documents, int64 [documents]
    """

    batches: list[Batch]
    length: int
    tokens: int
    lengths: Indices


class _Steps(Dataset[Step | Exception]):
    """The step of each global batch, given as the numbers of its rows (int64 [n]).

    Or the error that ends in a line, as a value: raised in a reader, torch would put the reader's
    whole traceback into its text.
    """

    def __init__(self, rows: Rows, share: Share) -> None:
        self.rows, self.share = rows, share

    def __getitem__(self, batch: Indices) -> Step | Exception:
        try:
            return self._step(batch)
        except (UserError, OSError) as error:
            return error

    def _step(self, batch: Indices) -> Step:
        share = self.share
        # One length for the whole batch: pipeline stages and sequence shards need it to agree, and
        # every rank knows it without asking.
        real = batch[batch != FILLER]
        used = self.rows.positions(real)
        multiple = LENGTH_MULTIPLE * share.multiple * share.context_size
        length = -(-max(1, int(used.max(initial=1))) // multiple) * multiple
        mine = rank_share(batch, share.rank, share.size, share.micro_batch)
        batches = [
            collate(
                [[] if row == FILLER else self.rows.documents(int(row)) for row in rows],
                length,
                packed=share.packed,
                context_size=share.context_size,
                context_rank=share.context_rank,
            )
            for rows in mine
        ]
        lengths = self.rows.lengths(real)  # `used` has the padding that context parallelism needs
        return Step(batches, length, int(lengths.sum()), lengths)


def load_steps(
    rows: Rows, share: Share, batches: Iterable[Indices], workers: int = 0
) -> Iterator[Step]:
    """The steps of `batches`, one after another; `workers` processes read ahead where there are.

    Errors: UserError when a worker dies, instead of waiting for it for ever, and for damaged data;
    OSError for files that cannot be read. Around what else the process does between the steps, put
    naming_dead_readers.
    """
    if workers:
        # Workers make no tokens; without this the library warns of each that is forked.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = DataLoader(
        _Steps(rows, share),
        batch_size=None,
        sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        worker_init_fn=outlive_signals if workers else None,
        collate_fn=_with_arrays,
        # A loader draws a seed: not from dropout's generator, which would then be another one in a
        # resumed run.
        generator=torch.Generator(),
        # fork: a worker starts at once, and touches neither CUDA nor a process group
        multiprocessing_context="fork" if workers else None,
    )
    with naming_dead_readers(workers):
        for read in loader:
            if isinstance(read, Exception):
                raise read
            yield _with_tensors(read)


def _with_arrays(step: Any) -> Any:
    """The step as a reader sends it: torch sends each tensor as a file of shared memory, which for
    these few kilobytes takes five times as long as their bytes do.
    """
    if isinstance(step, Exception):
        return step
    batches = [{name: tensor.numpy() for name, tensor in b.items()} for b in step.batches]
    return step._replace(batches=batches)


def _with_tensors(step: Any) -> Step:
    def tensor(array: Any) -> Tensor:
        made = torch.from_numpy(array)
        return made.pin_memory() if torch.cuda.is_available() else made

    batches = [{name: tensor(array) for name, array in b.items()} for b in step.batches]
    return Step(*step)._replace(batches=batches)


@contextmanager
def naming_dead_readers(workers: int) -> Iterator[None]:
    """The error of a worker that dies, as a UserError; for all that goes on while workers read.

    torch hears of the death by a signal and raises wherever the process then is, mostly not where
    it waits for data.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"data.workers={workers}: a process that reads the data died "
            f"({' '.join(str(error).split())}): the machine may be short of memory; use fewer"
        ) from error
