"""deft_forward_step: megatron-core's own schedule and gradients, with Bridge's step as it is.

Megatron-Bridge needs TransformerEngine and a GPU. Its forward step, loss function and model
provider are stood in for here by the same signatures; the model, the schedule, the wrapping and
the reduction of gradients are megatron-core's.
"""

import inspect
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_deft import token_loss
from megatron_deft.errors import UserError
from megatron_deft.integrations import bridge
from megatron_deft.integrations.bridge import deft_forward_step, ignore_masked, objective_loss
from tests.distributed import run_ranks
from tests.loss.test_attach import SPEC, VOCAB

BATCHES = 2  # micro-batches of each rank


class Provider:
    """What Bridge's ModelProviderMixin is to a hook."""

    def __init__(self) -> None:
        self.vocab_size = None  # Bridge takes it from the tokenizer, later
        self.context_parallel_size = 1
        self.calculate_per_token_loss = False
        self.hooks: list[Any] = []

    def register_pre_wrap_hook(self, hook: Any, prepend: bool = False) -> None:
        self.hooks.append(hook)


def configuration() -> Any:
    return SimpleNamespace(
        model=Provider(),
        ddp=SimpleNamespace(average_in_collective=True),
        dist=SimpleNamespace(use_decentralized_pg=False),
    )


def masked_next_token_loss(
    loss_mask: Tensor,
    output_tensor: Tensor,
    check_for_nan_in_loss: bool = True,
    check_for_spiky_loss: bool = False,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    assert check_for_nan_in_loss
    mask = loss_mask.reshape(-1).float()
    loss = (output_tensor.reshape(-1).float() * mask).sum()
    tokens = mask.sum().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}


def forward_step(
    state: Any, data_iterator: Any, model: nn.Module, return_schedule_plan: bool = False
) -> tuple[Tensor, Any]:
    batch = next(data_iterator)
    output = model(
        input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None,
        labels=batch["labels"],
    )  # fmt: skip
    return output, partial(
        masked_next_token_loss, batch["loss_mask"],
        check_for_nan_in_loss=True, check_for_spiky_loss=False,
    )  # fmt: skip


class Once:
    """Bridge's iterators have __next__ alone."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.left = list(batches)

    def __next__(self) -> dict[str, Tensor]:
        return self.left.pop(0)


def batches(rank: int) -> list[dict[str, Tensor]]:
    """Micro-batches of unlike many trained tokens; what is masked has labels all the same."""
    made = []
    for number in range(BATCHES):
        generator = torch.Generator().manual_seed(10 * rank + number)
        tokens = torch.randint(0, VOCAB, (2, 10), generator=generator)
        mask = torch.zeros(2, 10)
        mask[0, 3 + number :] = 1.0
        mask[1, 7 - 2 * rank :] = 1.0
        made.append({
            "tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": mask,
            "position_ids": torch.arange(10).repeat(2, 1),
        })  # fmt: skip
    return made


def build(config: Any) -> tuple[Any, Any]:
    """The model as Bridge builds it: hooks, then DistributedDataParallel."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from megatron_deft.models.build import build_model, transformer_config

    per_token = config.model.calculate_per_token_loss
    tcfg = transformer_config(SPEC, dtype="fp32", calculate_per_token_loss=per_token)
    torch.manual_seed(1)
    model = build_model(SPEC, tcfg, vocab_pad_multiple=8)
    config.model.vocab_size = VOCAB
    chunks = [model]
    for hook in config.model.hooks:
        chunks = hook(chunks)
    tcfg.finalize_model_grads_func = finalize_model_grads
    average = config.ddp.average_in_collective
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, average_in_collective=average
    )
    ddp = DistributedDataParallel(tcfg, ddp_config, chunks[0])
    return model, ddp


def by_hand(model: Any, spec: str, reduction: str, world: int) -> tuple[Tensor, Tensor]:
    """The objective over all micro-batches of all ranks, and its gradient, from plain logits."""
    losses, counts = [], []
    for rank in range(world):
        for batch in batches(rank):
            labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
            logits = model(batch["tokens"], batch["position_ids"], None)
            loss, stats = token_loss(logits, labels, spec, vocab_size=VOCAB, return_stats=True)
            losses.append(loss.sum())
            counts.append(stats.keep.sum())
    if reduction == "token":
        total = torch.stack(losses).sum() / torch.stack(counts).sum()
    else:
        total = (torch.stack(losses) / torch.stack(counts).clamp(min=1)).mean()
    (gradient,) = torch.autograd.grad(total, model.output_layer.weight)
    return total.detach(), gradient


def train_a_step(rank: int, world: int, cases: list[tuple[str, str]]) -> None:
    from megatron_deft import platform

    platform.initialize()
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for spec, reduction in cases:
        config = configuration()
        step = deft_forward_step(config, spec, reduction=reduction, forward_step=forward_step)
        assert config.model.calculate_per_token_loss == (reduction == "token")
        model, ddp = build(config)
        value, wanted = by_hand(model, spec, reduction, world)
        ddp.zero_grad_buffer()
        state = SimpleNamespace()
        parts = get_forward_backward_func()(
            forward_step_func=partial(step, state), data_iterator=Once(batches(rank)), model=[ddp],
            num_microbatches=BATCHES, seq_length=10, micro_batch_size=2, forward_only=False,
        )  # fmt: skip
        gradient = model.output_layer.weight.main_grad
        close = {"rtol": 1e-4, "atol": 1e-6 * wanted.abs().max().item()}
        torch.testing.assert_close(gradient, wanted, **close, msg=f"{spec} {reduction}")
        assert set(parts[0]) == {"lm loss", "ce", "p", "gate", "collision", "entropy", "accuracy"}
        sums = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
        for total in sums.values():  # as Bridge's train_step does
            torch.distributed.all_reduce(total)
        means = {name: (total[0] / total[1]).item() for name, total in sums.items()}
        assert sums["ce"][1] == sums["lm loss"][1]
        if reduction == "token":
            assert means["lm loss"] == pytest.approx(value.item(), rel=1e-5)
        assert 0 < means["p"] < 1
        assert means["ce"] > 0
        if spec == "nll":
            assert means["ce"] == pytest.approx(means["lm loss"], rel=1e-5)
            assert means["gate"] == 1.0
        assert step.attachment is not None
        step.attachment.detach()
        torch.distributed.barrier()


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_of_megatron_core_takes_the_objectives_gradient(world: int) -> None:
    cases = [
        (spec, reduction)
        for spec in ("nll", "deft", "dft", "OnlyTopP-0.01", "cayley")
        for reduction in ("token", "micro_batch")
    ]
    run_ranks(world, train_a_step, cases)


def in_one_process(rank: int, world: int) -> None:
    from megatron_deft import platform

    platform.initialize()
    config = configuration()
    step = deft_forward_step(config, "deft", forward_step=forward_step)
    with pytest.raises(UserError, match="very config"):
        step(SimpleNamespace(), Once(batches(0)), nn.Linear(2, 2))
    assert config.ddp.average_in_collective is False
    _, ddp = build(config)
    with pytest.raises(UserError, match="overlap_moe_expert_parallel_comm"):
        step(SimpleNamespace(), Once(batches(0)), ddp, return_schedule_plan=True)
    with torch.no_grad():  # evaluation
        output, loss_function = step(SimpleNamespace(), Once(batches(0)), ddp)
        loss, count, report = loss_function(output)
    assert loss.item() == pytest.approx(output.sum().item())
    assert count.dtype == torch.int
    assert count == batches(0)[0]["loss_mask"].sum()
    assert report["ce"].shape == (2,)

    def fused(state: Any, data: Any, model: nn.Module) -> Any:  # past the hook
        return torch.ones(2, 10), partial(masked_next_token_loss, torch.ones(2, 10))

    step._forward_step = fused
    output, loss_function = step(SimpleNamespace(), None, ddp)
    with pytest.raises(UserError, match="fused with the output layer"):
        loss_function(output)

    # a weight of 2 counts as two tokens
    weighted = {**batches(0)[0], "loss_mask": batches(0)[0]["loss_mask"] * 2}
    step._forward_step = forward_step
    with torch.no_grad():
        output, loss_function = step(SimpleNamespace(), Once([weighted]), ddp)
        twice = loss_function(output)
    assert twice[0].item() == pytest.approx(2 * loss.item())
    assert twice[1] == 2 * count
    torch.testing.assert_close(twice[2]["p"], 2 * report["p"])


def test_what_a_step_refuses_and_returns() -> None:
    run_ranks(1, in_one_process)


def test_labels_are_ignored_where_the_mask_is_zero() -> None:
    batch = batches(0)[0]
    changed = ignore_masked(batch)
    assert torch.equal(changed["labels"] == -100, batch["loss_mask"] == 0)
    assert not bool((batch["labels"] == -100).any())  # a rerun takes the same batch again
    assert ignore_masked({"tokens": batch["tokens"]}) == {"tokens": batch["tokens"]}


def test_a_loss_function_of_another_kind_is_an_error() -> None:
    statistics = SimpleNamespace(keep=torch.ones(2, 10, dtype=torch.bool))
    for other in (masked_next_token_loss, partial(masked_next_token_loss, torch.ones(3))):
        with pytest.raises(UserError, match="expected partial"):
            objective_loss(other, statistics, torch.ones(2, 10))  # type: ignore[arg-type]


def test_configurations_that_cannot_be_honoured() -> None:
    with pytest.raises(UserError, match="legal are token, micro_batch"):
        deft_forward_step(configuration(), "deft", reduction="sample")
    config = configuration()
    config.model.context_parallel_size = 2
    with pytest.raises(UserError, match="context_parallel_size=2"):
        deft_forward_step(config, "deft", reduction="micro_batch")
    config = configuration()
    config.dist.use_decentralized_pg = True
    deft_forward_step(config, "deft")
    with pytest.raises(UserError, match="use_decentralized_pg"):
        deft_forward_step(config, "cayley")
    config.model = SimpleNamespace(context_parallel_size=1, calculate_per_token_loss=True)
    with pytest.raises(UserError, match="register_pre_wrap_hook"):
        deft_forward_step(config, "deft")


def test_newer_configurations_of_a_model_have_a_list_of_hooks() -> None:
    config = configuration()
    config.model = SimpleNamespace(
        context_parallel_size=1, pre_wrap_hooks=[],
        transformer=SimpleNamespace(calculate_per_token_loss=False),
    )  # fmt: skip
    step = deft_forward_step(config, "deft")
    assert config.model.pre_wrap_hooks == [step.attach]
    assert config.model.transformer.calculate_per_token_loss is True


def test_bridge_sees_a_step_that_wants_its_state() -> None:
    """Bridge hands its GlobalState to steps whose first parameter is so named, or so annotated."""
    step = deft_forward_step(configuration(), "deft")
    parameters = inspect.signature(step).parameters
    assert list(parameters) == ["state", "data_iterator", "model", "return_schedule_plan"]
    assert "GlobalState" in str(parameters["state"].annotation)
    assert parameters["return_schedule_plan"].default is False
    assert bridge.__name__ in sys.modules
    assert not [name for name in sys.modules if name.startswith("megatron.bridge")]
