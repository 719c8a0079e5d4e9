"""Dense and packed batches over context, tensor and pipeline ranks give what one process gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_deft.data.batches import Batch, collate
from megatron_deft.data.samples import Encoded
from megatron_deft.models.packed import packed_seq_params
from megatron_deft.platform import initialize, shutdown
from tests.distributed import run_ranks
from tests.models.documents import (
    Gradients,
    Losses,
    alone,
    build,
    by_place,
    documents,
    gradients,
    losses_of,
    tolerance,
    total,
)
from tests.platform.tiny import load, save

# Two micro-batches: neighbours of equal length once padded, and documents beyond the windows.
MICRO_BATCHES = ((13, 8, 6, 1), (10, 17))
LENGTHS = {"dense": (16, 24), "packed": (48, 40)}  # of their rows: all chunks hold real tokens


@dataclass(frozen=True)
class Layout:
    family: str = "llama"
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence: bool = False
    recompute: str = "none"

    @property
    def sizes(self) -> dict[str, int]:
        return {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context}


LAYOUTS = {  # those of the same sizes next to one another: they share process groups
    **{
        f"context, {family}": Layout(family, context=2)
        for family in ("llama", "gemma2", "mistral", "glm", "mixtral")
    },
    "context of four, recomputed": Layout("mistral", context=4, recompute="full"),
    "context x tensor": Layout(context=2, tensor=2, sequence=True),
    "pipeline": Layout(pipeline=2),
    "pipeline x context": Layout(pipeline=2, context=2),
}
FAMILIES = sorted({layout.family for layout in LAYOUTS.values()})


@dataclass(frozen=True)
class Found:
    """What one rank saw; each micro-batch's losses on the last stage."""

    losses: list[Losses]
    gradients: Gradients  # this rank's shard, summed over all that share it
    expected: Gradients
    is_cut_as_megatron_does: bool


def all_samples() -> list[list[Encoded]]:
    return [documents(*lengths) for lengths in MICRO_BATCHES]


def batch_of(number: int, form: str, size: int, rank: int) -> Batch:
    samples = all_samples()[number]
    rows = [samples] if form == "packed" else [[sample] for sample in samples]
    return collate(
        rows, LENGTHS[form][number], packed=form == "packed", context_size=size, context_rank=rank
    )


def reference(family: str, folder: Path) -> list[Losses]:
    """Documents alone; writes the model's weights, and its gradients as weights."""
    model = build(family)
    parts = [alone(model, samples) for samples in all_samples()]
    save(model, folder / family)
    whole = total([part for _, found in parts for part in found])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(whole[name])
    save(model, folder / f"{family} gradients")
    return [losses for losses, _ in parts]


def batches_of(form: str) -> tuple[list[Batch], bool]:
    """This rank's, and whether dense ones are cut as megatron-core cuts them."""
    context = parallel_state.get_context_parallel_group()
    batches = [batch_of(number, form, context.size(), context.rank()) for number in range(2)]
    wholes = [get_batch_on_this_cp_rank(batch_of(n, "dense", 1, 0), context) for n in range(2)]
    is_same = form == "packed" or all(
        torch.equal(ours[name], whole[name])
        for ours, whole in zip(batches, wholes, strict=True)
        for name in whole
    )
    return batches, is_same


def forward_backward(model: GPTModel, batches: list[Batch]) -> list[Losses]:
    """Through megatron-core's schedule; the losses, if this is a last stage."""
    losses: list[Losses] = []

    def forward_step(micro_batches: Any, model: GPTModel) -> tuple[Tensor, Any]:
        batch = next(micro_batches)
        output = model(
            batch["tokens"], batch["position_ids"], None,
            packed_seq_params=packed_seq_params(batch),
        )  # fmt: skip

        def loss_function(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            loss = losses_of(logits, batch)
            losses.append(by_place(loss, batch))
            return (loss * batch["weights"]).sum(), torch.tensor(1, dtype=torch.int), {}

        return output, loss_function

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=2,
        seq_length=48,  # not asked for: stages tell each other
        micro_batch_size=1,
        forward_only=False,
    )
    return losses


def one_layout(layout: Layout, folder: Path) -> dict[str, Found]:
    model = build(
        layout.family, sequence=layout.sequence, recompute=layout.recompute, **layout.sizes
    )
    load(model, folder / f"{layout.family} gradients")
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    load(model, folder / layout.family)
    found = {}
    for form in LENGTHS:
        batches, is_same_cut = batches_of(form)
        losses = forward_backward(model, batches)
        mine = gradients(model)
        for name, parameter in model.named_parameters():
            gradient = mine.setdefault(name, torch.zeros_like(parameter))
            dist.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
        found[form] = Found(losses, mine, expected, is_same_cut)
    return found


def all_layouts(
    rank: int, world_size: int, folder: Path
) -> tuple[dict[str, list[Losses]], dict[str, dict[str, Found]]]:
    initialize(seed=3)
    losses = {family: reference(family, folder) for family in FAMILIES}
    found = {}
    sizes: dict[str, int] = {}
    for name, layout in LAYOUTS.items():
        if layout.sizes != sizes:
            shutdown()
            sizes = layout.sizes
            initialize(**sizes)
        found[name] = one_layout(layout, folder)
    shutdown()
    return losses, found


Runs = tuple[dict[str, list[Losses]], list[dict[str, dict[str, Found]]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    ranks = run_ranks(4, all_layouts, tmp_path_factory.mktemp("runs"))
    return ranks[0][0], [found for _, found in ranks]


@pytest.mark.parametrize("form", LENGTHS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_what_documents_alone_give(runs: Runs, name: str, form: str) -> None:
    family, ranks = LAYOUTS[name].family, [rank[name][form] for rank in runs[1]]
    limits = tolerance(family)
    for number, expected in enumerate(runs[0][family]):
        found: Losses = {}
        for rank in ranks:
            if rank.losses:  # a last stage
                found |= rank.losses[number]
        assert found.keys() == expected.keys()
        for place, loss in expected.items():
            assert found[place] == pytest.approx(loss, rel=limits["rtol"], abs=limits["atol"])
    for rank in ranks:
        assert rank.is_cut_as_megatron_does
        assert rank.gradients.keys() == rank.expected.keys()
        for key, value in rank.expected.items():
            torch.testing.assert_close(
                rank.gradients[key], value, msg=lambda text, key=key: f"{key}: {text}", **limits
            )


def test_context_ranks_hold_different_positions(runs: Runs) -> None:
    places = [set(rank["context, llama"]["packed"].losses[0]) for rank in runs[1]]
    assert not places[0] & places[1]
    assert places[0] | places[1] == set(runs[0]["llama"][0])
