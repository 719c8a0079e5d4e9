"""Every kind of parallelism that runs on gloo gives the numbers of one process."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_deft.platform import initialize, shutdown
from tests.distributed import run_ranks
from tests.platform import tiny
from tests.platform.tiny import Layout

Curve = tuple[list[float], list[float]]

LAYOUTS = {
    "tensor x pipeline x data": Layout(tensor=2, pipeline=2),
    "sequence": Layout(tensor=2, sequence=True),
    "more ranks than query groups": Layout(tensor=4, sequence=True),
    "everything": Layout(2, 2, sequence=True, recompute="full", overlap=True),
    "bf16": Layout(tensor=2, pipeline=2, sequence=True, dtype="bf16"),
}
SAVED = "tensor x pipeline x data"


def one_layout(layout: Layout, initial: Path, trained: Path | None = None) -> Curve:
    initialize(layout.tensor, layout.pipeline)
    model = tiny.build(layout)
    tiny.load(model, initial)
    curve = tiny.train(model, layout)
    if trained is not None:
        tiny.save(model, trained)
    shutdown()
    return curve


def all_layouts(rank: int, world_size: int, initial: Path, trained: Path) -> dict[str, Curve]:
    return {
        name: one_layout(layout, initial, trained if name == SAVED else None)
        for name, layout in LAYOUTS.items()
    }


@dataclass(frozen=True)
class Runs:
    whole: Curve  # one process
    split: dict[str, Curve]  # eight ranks, by name of LAYOUTS
    logits: torch.Tensor  # after training in one process
    logits_loaded: torch.Tensor  # one process, weights trained and saved in layout SAVED


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("runs")
    initialize()
    model = tiny.build(Layout())
    tiny.save(model, folder / "initial")
    whole = tiny.train(model, Layout())
    logits = tiny.logits_of(model)

    ranks = run_ranks(8, all_layouts, folder / "initial", folder / "trained")
    assert all(ranks[0] == other for other in ranks), "ranks disagree about the loss"
    tiny.load(model, folder / "trained")
    yield Runs(whole, ranks[0], logits, tiny.logits_of(model))
    shutdown()


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "bf16"])
def test_layout_trains_as_one_process(runs: Runs, name: str) -> None:
    for split, whole in zip(runs.split[name], runs.whole, strict=True):
        assert split == pytest.approx(whole, rel=5e-6)


def test_training_moves_the_loss(runs: Runs) -> None:
    losses, norms = runs.whole
    assert max(losses) - min(losses) > 0.05
    assert min(norms) > 0.1


def test_bf16_trains_nearly_as_fp32(runs: Runs) -> None:
    losses, norms = runs.split["bf16"]
    assert losses == pytest.approx(runs.whole[0], rel=0.02)
    assert losses != runs.whole[0]
    assert norms == pytest.approx(runs.whole[1], rel=0.1)


def test_checkpoint_of_four_shards_loads_in_one_process(runs: Runs) -> None:
    torch.testing.assert_close(runs.logits_loaded, runs.logits, rtol=1e-4, atol=1e-4)
