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
LENGTHS = (48, 40)  # of packed rows; of dense ones too, more than their documents need


@dataclass(frozen=True)
class Layout:
    family: str = "llama"
    packed: bool = True
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    options: tuple[tuple[str, Any], ...] = ()


LAYOUTS = {
    **{
        f"context, {family}, {'packed' if packed else 'dense'}": Layout(family, packed, context=2)
        for family in ("llama", "gemma2", "mistral", "glm", "mixtral")
        for packed in (False, True)
    },
    "context of four": Layout("mistral", context=4),
    "context, recomputed": Layout(context=2, options=(("recompute", "full"),)),
    "context x tensor, dense": Layout(
        packed=False, context=2, tensor=2, options=(("sequence", True),)
    ),
    "context x tensor, packed": Layout(context=2, tensor=2, options=(("sequence", True),)),
    "pipeline": Layout(pipeline=2),
    "pipeline x tensor": Layout(pipeline=2, tensor=2, options=(("sequence", True),)),
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


def batch_of(layout: Layout, number: int, size: int, rank: int) -> Batch:
    samples = all_samples()[number]
    rows = [samples] if layout.packed else [[sample] for sample in samples]
    return collate(
        rows, LENGTHS[number], packed=layout.packed, context_size=size, context_rank=rank
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


def forward_backward(layout: Layout, model: GPTModel) -> tuple[list[Losses], bool]:
    context = parallel_state.get_context_parallel_group()
    batches = [batch_of(layout, n, context.size(), context.rank()) for n in range(2)]
    is_same_cut = True
    if not layout.packed:
        wholes = [get_batch_on_this_cp_rank(batch_of(layout, n, 1, 0), context) for n in range(2)]
        is_same_cut = all(
            torch.equal(ours[name], whole[name])
            for ours, whole in zip(batches, wholes, strict=True)
            for name in whole
        )
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
        seq_length=max(LENGTHS),
        micro_batch_size=1,
        forward_only=False,
    )
    return losses, is_same_cut


def one_layout(layout: Layout, folder: Path) -> Found:
    initialize(layout.tensor, layout.pipeline, layout.context)
    sizes = {"tensor": layout.tensor, "pipeline": layout.pipeline, "context": layout.context}
    model = build(layout.family, **sizes, **dict(layout.options))
    load(model, folder / layout.family)
    losses, is_same_cut = forward_backward(layout, model)
    found = gradients(model)
    for name, parameter in model.named_parameters():
        gradient = found.setdefault(name, torch.zeros_like(parameter))
        dist.all_reduce(gradient, group=parallel_state.get_context_parallel_group())
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    load(model, folder / f"{layout.family} gradients")
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    shutdown()
    return Found(losses, found, expected, is_same_cut)


def all_layouts(
    rank: int, world_size: int, folder: Path
) -> tuple[dict[str, list[Losses]], dict[str, Found]]:
    initialize(seed=3)
    losses = {family: reference(family, folder) for family in FAMILIES}
    shutdown()
    return losses, {name: one_layout(layout, folder) for name, layout in LAYOUTS.items()}


Runs = tuple[dict[str, list[Losses]], list[dict[str, Found]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    ranks = run_ranks(4, all_layouts, tmp_path_factory.mktemp("runs"))
    return ranks[0][0], [found for _, found in ranks]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_what_documents_alone_give(runs: Runs, name: str) -> None:
    layout, limits = LAYOUTS[name], tolerance(LAYOUTS[name].family)
    for number, expected in enumerate(runs[0][layout.family]):
        found: Losses = {}
        for rank in runs[1]:
            if rank[name].losses:  # a last stage
                found |= rank[name].losses[number]
        assert found.keys() == expected.keys()
        for place, loss in expected.items():
            assert found[place] == pytest.approx(loss, rel=limits["rtol"], abs=limits["atol"])
    for rank in runs[1]:
        one = rank[name]
        assert one.is_cut_as_megatron_does
        assert one.gradients.keys() == one.expected.keys()
        for key, value in one.expected.items():
            torch.testing.assert_close(
                one.gradients[key], value, msg=lambda text, key=key: f"{key}: {text}", **limits
            )


def test_context_ranks_hold_different_positions(runs: Runs) -> None:
    places = [set(rank["context, llama, packed"].losses[0]) for rank in runs[1]]
    assert not places[0] & places[1]
    assert places[0] | places[1] == set(runs[0]["llama"][0])
