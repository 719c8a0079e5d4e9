"""fused_linear_loss over gloo ranks: the vocabulary split, and the sequence with it."""

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_deft import fused_linear_loss
from megatron_deft.errors import UserError
from megatron_deft.loss import linear_head
from tests.distributed import run_ranks
from tests.loss.head_cases import (
    DTYPES,
    Case,
    Result,
    allowed,
    check,
    check_case,
    exact,
    make,
    only,
    uninitialised_memory_is_nan,
)
from tests.oracle import SPECS

Layout = dict[str, Any]

MANY_TILES: Layout = {"chunk_tokens": 7}
LAYOUTS: list[Layout] = [
    {"chunk_tokens": 1000},
    {"chunk_tokens": 1000, "kept_tokens": 40},  # ignored tokens go along
    MANY_TILES,
    {"chunk_tokens": 10, "form": "forward"},
]


@cache
def cases(dtype: torch.dtype) -> dict[str, Case]:
    """Of 44 tokens, which 4 ranks divide."""
    odd = make(dtype, tokens=44, vocab=507, padded=512, bias=True)
    return {
        "odd": odd,
        # from the second of 4 ranks on, and of 2
        "ranks of padding alone": make(dtype, tokens=44, vocab=100, padded=512, softcap=4.0),
        "none kept": only(odd, []),
        "one kept": only(odd, [17]),
        "kept on the first rank alone": only(odd, [0, 3, 4, 9]),
    }


def plan() -> list[tuple[torch.dtype, str, str, Layout]]:
    """Every objective on odd sizes; every case in every dtype, in both forms."""
    found = [(torch.float32, spec, "odd", MANY_TILES) for spec in SPECS]
    for dtype, layout in product(DTYPES, LAYOUTS):
        if dtype != torch.float16 or "form" not in layout:
            found += [(dtype, "DEFT", name, layout) for name in cases(dtype)]
            found += [(dtype, "eaft", "ranks of padding alone", layout)]
    return found


@cache
def truth(dtype: torch.dtype, spec: str, name: str) -> tuple[Result, dict[str, float]]:
    case = cases(dtype)[name]
    return exact(spec, case), allowed(spec, case)


def mine(case: Case, rank: int, world: int, sequence_parallel: bool) -> Case:
    """This rank's rows of the weight, and of the hidden states where the sequence is split."""
    rows = slice(*(r * len(case.weight) // world for r in (rank, rank + 1)))
    tokens = slice(*(r * len(case.hidden) // world for r in (rank, rank + 1)))
    return replace(
        case,
        hidden=case.hidden[tokens] if sequence_parallel else case.hidden,
        weight=case.weight[rows],
        bias=None if case.bias is None else case.bias[rows],
    )


def on_a_rank(rank: int, world: int, sequence_parallel: bool) -> list[tuple[Result, Tensor]]:
    linear_head.CPU_TILE_TOKENS = 8
    alone = dist.new_group([rank], use_local_synchronization=True)  # its tokens are the batch
    found = []
    with uninitialised_memory_is_nan():
        for dtype, spec, name, layout in plan():
            case = mine(cases(dtype)[name], rank, world, sequence_parallel)
            h, w = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
            b = None if case.bias is None else case.bias.clone().requires_grad_()
            loss, stats = fused_linear_loss(
                h, w, case.labels, spec, group=dist.group.WORLD, bias=b, softcap=case.softcap,
                sequence_parallel=sequence_parallel, token_weight=case.upstream,
                vocab_size=case.vocab, batch_group=alone, **layout,
            )  # fmt: skip
            loss.backward()
            for value in vars(stats).values():
                assert bool((value[case.labels == -100] == 0).all())
            grads = (h.grad, w.grad, None if b is None else b.grad)
            found.append((Result(stats.loss, *grads), loss.detach()))
    return found


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_are_the_whole(world: int, sequence_parallel: bool) -> None:
    ranks = run_ranks(world, on_a_rank, sequence_parallel)
    for i, (dtype, spec, name, _) in enumerate(plan()):
        parts = [ranks[r][i][0] for r in range(world)]
        for r in range(world):
            assert torch.equal(parts[r].loss, parts[0].loss)
            assert torch.equal(ranks[r][i][1], ranks[0][i][1])
            if not sequence_parallel:
                assert torch.equal(parts[r].hidden, parts[0].hidden)
        case = cases(dtype)[name]
        whole = Result(
            parts[0].loss,
            torch.cat([p.hidden for p in parts]) if sequence_parallel else parts[0].hidden,
            torch.cat([p.weight for p in parts]),
            None if case.bias is None else torch.cat([p.bias for p in parts]),
        )
        check_case(case, whole, *truth(dtype, spec, name))


def two_by_two(
    rank: int, world: int, spec: str, kept: list[int], form: str
) -> tuple[Result, Tensor]:
    """Ranks 0 and 1 share the vocabulary, as 2 and 3 do; 0 and 2 have half of the tokens each."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    tensor_parallel, batch = groups[rank // 2], groups[2 + rank % 2]
    case = only(cases(torch.float32)["odd"], kept)
    half = slice(22 * (rank // 2), 22 * (rank // 2) + 22)
    labels, upstream = case.labels[half], case.upstream[half]
    case = mine(replace(case, hidden=case.hidden[half]), rank % 2, 2, sequence_parallel=True)
    h, w = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
    loss, stats = fused_linear_loss(
        h, w, labels, spec, group=tensor_parallel, sequence_parallel=True, bias=case.bias,
        token_weight=upstream, vocab_size=case.vocab, batch_group=batch, form=form, chunk_tokens=6,
    )  # fmt: skip
    loss.backward()
    return Result(stats.loss, h.grad, w.grad, None), loss.detach()


@pytest.mark.parametrize(
    ("spec", "kept", "form"),
    [
        ("cayley(floor=data_parallel)", list(range(44)), "recompute"),
        ("cayley(floor=data_parallel)", [0, 3, 17], "recompute"),  # none on ranks 2 and 3
        ("Cayley_Trans", [], "recompute"),
        ("DEFT", [30], "forward"),
    ],
)
def test_tokens_split_over_another_group(spec: str, kept: list[int], form: str) -> None:
    """Data or context parallel: the weight's gradients add up; Cayley's mean is over all tokens."""
    ranks = [result for result, _ in run_ranks(4, two_by_two, spec, kept, form)]
    case = only(cases(torch.float32)["odd"], kept)
    halves = [torch.cat([ranks[r].weight, ranks[r + 1].weight]) for r in (0, 2)]
    whole = Result(
        torch.cat([ranks[0].loss, ranks[2].loss]),
        torch.cat([r.hidden for r in ranks]),
        halves[0] + halves[1],
        None,
    )
    check(spec, case, whole)
    if not any(token >= 22 for token in kept):
        assert bool((halves[1] == 0).all())


def talk(rank: int, world: int) -> dict[str, list[str]]:
    """What is sent, in order: function, shape, and whether in the forward or the backward."""
    calls: list[str] = []
    for name in ("all_gather_into_tensor", "all_reduce", "all_gather", "reduce_scatter_tensor"):
        original = getattr(dist, name)

        def counted(*args: Any, _name: str = name, _call: Any = original, **kwargs: Any) -> Any:
            sent = args[1] if len(args) > 1 else args[0]
            calls.append(f"{_name}{list(sent.shape)}")
            return _call(*args, **kwargs)

        setattr(dist, name, counted)
    labels = torch.tensor([1, -100, 2, -100, 3, 4, 5, -100])
    found = {}
    for name, options in {
        "whole sequence": {}, "sequence parallel": {"sequence_parallel": True},
        "in the forward": {"form": "forward", "chunk_tokens": 4},
    }.items():  # fmt: skip
        own = torch.randn(4 if "parallel" in name else 8, 16, requires_grad=True)
        weight = torch.randn(10, 16, requires_grad=True)
        for _ in range(2):  # the first call also asks once whether the shards are equal
            calls.clear()
            loss, _ = fused_linear_loss(own, weight, labels, group=dist.group.WORLD, **options)
            calls.append("backward")
            loss.backward()
        found[name] = list(calls)
    return found


def test_what_is_sent() -> None:
    """Five floats for a kept token, and hidden states or their gradient once."""
    for found in run_ranks(2, talk):
        assert found == {
            "whole sequence": ["all_gather_into_tensor[5, 5]", "backward", "all_reduce[5, 16]"],
            "sequence parallel": [
                "all_gather_into_tensor[4, 16]", "all_gather_into_tensor[5, 5]", "backward",
                "reduce_scatter_tensor[8, 16]",
            ],
            "in the forward": [
                *["all_gather_into_tensor[5, 2]"] * 2, "all_gather_into_tensor[5, 1]", "backward",
                "all_reduce[5, 16]",
            ],
        }  # fmt: skip


def shapes(rank: int, world: int) -> list[Tensor]:
    """[s, b, H] of each rank, as megatron-core's; labels [s * ranks, b], weights too."""
    case = cases(torch.float32)["odd"]
    part = mine(case, rank, world, sequence_parallel=True)
    hidden = part.hidden.reshape(11, 2, -1).requires_grad_()
    weight = torch.nn.Parameter(part.weight.clone())
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    for _ in range(2):
        loss, stats = fused_linear_loss(
            hidden, weight, case.labels.reshape(22, 2), group=dist.group.WORLD, bias=part.bias,
            sequence_parallel=True, token_weight=case.upstream.reshape(22, 2),
            vocab_size=case.vocab, main_grad=True, chunk_tokens=9,
        )  # fmt: skip
        loss.backward()
    assert hidden.grad is not None
    return [stats.loss, hidden.grad, weight.main_grad]  # type: ignore[attr-defined]


def test_sequence_first_and_two_micro_batches_into_main_grad() -> None:
    first, second = run_ranks(2, shapes)
    assert first[0].shape == (22, 2)
    twice = Result(
        first[0].flatten(),
        torch.cat([first[1], second[1]]).flatten(0, 1),
        torch.cat([first[2], second[2]]),
        None,
    )
    case = cases(torch.float32)["odd"]
    doubled = replace(case, upstream=2 * case.upstream)
    check("DEFT", doubled, twice)


def refused_on_ranks(rank: int, world: int) -> list[str]:
    messages = []
    given: dict[str, Any] = {
        "hidden": torch.zeros(2, 3, 4), "weight": torch.zeros(8, 4),
        "labels": torch.zeros(2, 3, dtype=torch.long),
    }  # fmt: skip
    calls: list[dict[str, Any]] = [
        {"sequence_parallel": True},  # labels of this rank's tokens alone
        {"hidden": torch.zeros(4), "labels": torch.tensor(0), "sequence_parallel": True},
        {"objective": "cayley(floor=data_parallel)"},
        {"vocab_size": 17},
        {"labels": torch.full((2, 3), rank), "vocab_size": 15},  # another's tokens
        {"chunk_tokens": 1 + rank, "vocab_size": 15},
        {"form": ("forward", "recompute")[rank], "vocab_size": 15},
        {"kept_tokens": 4 + rank, "vocab_size": 15},
    ]
    for options in calls:
        with pytest.raises(UserError) as caught:
            fused_linear_loss(**given | options, group=dist.group.WORLD)
        messages.append(str(caught.value))
    return messages


def test_bad_input_on_ranks() -> None:
    for messages in run_ranks(2, refused_on_ranks):
        sequence, scalar, mean, vocabulary, labels, *options = messages
        assert "labels: expected shape [4, 3] (of the hidden states of all ranks" in sequence
        assert scalar == "sequence_parallel needs hidden states with a dimension to split"
        assert "pass their process group as batch_group" in mean
        assert "vocab_size: expected 1 to 16 (2 rank(s) x 8 columns), got 17" in vocabulary
        assert "expected the same sum of the labels on every rank" in labels
        for name, message in zip(("chunk_tokens", "form", "kept_tokens"), options, strict=True):
            assert f"expected the same {name} on every rank, got [" in message
