"""attach: the objective reaches the gradient of real megatron-core models."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_deft import attach, token_loss
from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec
from tests.distributed import run_ranks
from tests.oracle import SPECS

VOCAB, PADDED = 61, 64
SPEC = ModelSpec(
    family="llama",
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=2,
    num_query_groups=2,
    head_dim=8,
    vocab_size=VOCAB,
    max_position_embeddings=32,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=False,
    attention_out_bias=False,
    mlp_bias=False,
    initializer_range=0.5,
)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (3, 12), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[:, :4] = -100
    return tokens, labels, torch.arange(12).repeat(3, 1)


def gpt(world: int, dtype: str = "fp32") -> Any:
    from megatron_deft import platform

    platform.initialize(tensor=world)
    from megatron_deft.models.build import build_model, transformer_config

    config = transformer_config(SPEC, tensor=world, dtype=dtype)
    return build_model(SPEC, config, vocab_pad_multiple=8 // world)


def compare_with_token_loss(rank: int, world: int, specs: list[str]) -> dict[str, Tensor]:
    model = gpt(world)
    from megatron.core import parallel_state

    tokens, labels, positions = batch()
    upstream = torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) + 0.5
    weight = model.output_layer.weight
    gradients = {}
    for spec in specs:
        attachment = attach(model, spec, vocab_size=VOCAB)
        loss = model(tokens, positions, None, labels=labels)
        (hooked,) = torch.autograd.grad((loss * upstream).sum(), weight)
        logits = model(tokens, positions, None)  # labels=None is unchanged
        direct, stats = token_loss(
            logits,
            labels,
            spec,
            group=parallel_state.get_tensor_model_parallel_group(),
            vocab_size=VOCAB,
            batch_group=parallel_state.get_data_parallel_group(),
            return_stats=True,
        )
        (wanted,) = torch.autograd.grad((direct * upstream).sum(), weight)
        torch.testing.assert_close(loss, direct, rtol=1e-6, atol=1e-7)
        # the two matrix products sum the tokens in another order
        torch.testing.assert_close(hooked, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())
        assert attachment.statistics is not None
        torch.testing.assert_close(attachment.statistics.gate, stats.gate)
        assert torch.equal(attachment.statistics.keep, stats.keep)
        if world == 1:  # padded rows of the output layer get no gradient
            assert bool((hooked[VOCAB:] == 0).all())
        gradients[spec] = hooked
        attachment.detach()
    return gradients


@pytest.mark.parametrize("world", [1, 2])
def test_the_gradient_through_attach_is_that_of_token_loss(world: int) -> None:
    gradients = run_ranks(world, compare_with_token_loss, SPECS)[0]
    for spec in SPECS:
        if spec not in ("nll", "tsallis(q=0)"):
            assert not torch.allclose(gradients[spec], gradients["nll"], rtol=1e-3), spec


def wrapped(rank: int, world: int) -> None:
    model = gpt(1, "bf16")
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    tokens, labels, positions = batch()
    own = model(tokens, positions, None, labels=labels.clamp(min=0))
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(), Float16Module(model.config, model)
    )
    attachment = attach([ddp], "deft", vocab_size=VOCAB)
    changed = ddp(tokens, positions, None, labels=labels)
    assert bool((changed[:, :4] == 0).all())
    assert not torch.allclose(changed[:, 4:], own[:, 4:])
    attachment.detach()
    torch.testing.assert_close(ddp(tokens, positions, None, labels=labels.clamp(min=0)), own)
    first, second = (
        attach(ddp, "deft", vocab_size=VOCAB),
        attach([ddp, ddp], "dft", vocab_size=VOCAB),
    )
    first.detach()  # it was replaced: the second stays
    ddp(tokens, positions, None, labels=labels)
    assert second.statistics is not None
    with pytest.raises(UserError, match="got Linear"):
        attach([ddp, torch.nn.Linear(2, 2)], "nll", vocab_size=VOCAB)
    second.statistics = None
    ddp(tokens, positions, None, labels=labels)  # and still, as nothing was attached
    assert second.statistics is not None
    second.detach()
    torch.testing.assert_close(ddp(tokens, positions, None, labels=labels.clamp(min=0)), own)
    with pytest.raises(UserError, match="does not fit"):
        attach(ddp, "deft", vocab_size=65)
    with pytest.raises(UserError, match="got Linear"):
        attach(torch.nn.Linear(2, 2), "deft", vocab_size=2)
    with pytest.raises(UserError, match="legal are"):
        attach(ddp, "cross-entropy", vocab_size=VOCAB)


def test_wrappers_lists_detach_and_errors() -> None:
    run_ranks(1, wrapped)


def mtp_gpt(heads: int, scale: float) -> Any:
    """A model with so many heads of multi-token prediction, whose losses are summed."""
    from megatron_deft import platform

    platform.initialize()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

    from megatron_deft.models.build import transformer_config
    from megatron_deft.models.spec import block_spec

    config = transformer_config(SPEC, calculate_per_token_loss=True)
    config.mtp_num_layers, config.mtp_loss_scaling_factor = heads, scale
    layers = block_spec(config, SPEC)
    model = GPTModel(
        config=config,
        transformer_layer_spec=layers,
        mtp_block_spec=get_gpt_mtp_block_spec(config, layers, use_transformer_engine=False),
        vocab_size=PADDED,
        max_sequence_length=32,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    MTPLossAutoScaler.set_loss_scale(torch.ones(1))
    return model


def with_mtp(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Gradient of the multi-token-prediction head's own layer: hook against a hand-made loss."""
    model = mtp_gpt(1, 1.0)
    tokens, labels, positions = batch()
    attachment = attach(model, "dft", vocab_size=VOCAB)
    seen: list[Any] = []
    hook = model.compute_language_model_loss
    model.compute_language_model_loss = lambda labels, logits: (
        seen.append((labels, logits)),
        hook(labels, logits),
    )[1]
    mask = (labels >= 0).float()
    loss = model(tokens, positions, None, labels=labels, loss_mask=mask)
    assert len(seen) == 2  # the MTP head, then the main one
    raised, mtp_logits = seen[0]
    # one higher on their way, and nothing where there is no label, beyond the end either
    mtp_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.equal(raised, (mtp_labels + 1).clamp(min=0))
    parameter = model.mtp.layers[0].eh_proj.weight
    rolled = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    by_hand = (token_loss(mtp_logits, mtp_labels.t(), "dft", vocab_size=VOCAB) * rolled.t()).sum()
    (want,) = torch.autograd.grad(by_hand, parameter, retain_graph=True)
    assert attachment.statistics is not None
    assert torch.equal(attachment.statistics.valid, labels >= 0)
    ((head, kept),) = attachment.heads
    assert torch.equal(kept, mtp_labels >= 0)
    torch.testing.assert_close((head * rolled).sum(), by_hand.detach())
    loss.sum().backward()
    return parameter.grad, want


def test_multi_token_prediction_heads_train_with_the_objective() -> None:
    got, want = run_ranks(1, with_mtp)[0]
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def across_data_parallel(rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Two ranks with different tokens; the batch mean of p is over both."""
    model = gpt(1)
    tokens, labels, positions = batch()
    mine = slice(0, 1) if rank == 0 else slice(1, 3)
    attach(model, "cayley(floor=data_parallel)", vocab_size=VOCAB)
    loss = model(tokens[mine], positions[mine], None, labels=labels[mine])
    whole = model(tokens, positions, None)
    return loss, token_loss(whole, labels, "cayley", vocab_size=VOCAB)[mine]


def test_cayley_over_the_data_parallel_ranks() -> None:
    for got, want in run_ranks(2, across_data_parallel):
        torch.testing.assert_close(got, want)


class EmptyStack(torch.nn.Module):
    """A stack of no layers: the real ones need Triton and TransformerEngine."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def mamba(rank: int, world: int) -> None:
    from megatron_deft import platform

    platform.initialize()
    from megatron.core.models.mamba import MambaModel
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_deft.models.build import transformer_config

    config = transformer_config(SPEC)
    model = MambaModel(
        config=config,
        mamba_stack_spec=ModuleSpec(module=EmptyStack),
        vocab_size=PADDED,
        max_sequence_length=32,
        hybrid_override_pattern="*-",
    )
    tokens, labels, positions = batch()
    attach(model, "deft", vocab_size=VOCAB)
    loss = model(tokens, positions, None, labels=labels)
    logits = model(tokens, positions, None)
    torch.testing.assert_close(loss, token_loss(logits, labels, "deft", vocab_size=VOCAB))
    (got,) = torch.autograd.grad(loss.sum(), model.output_layer.weight)
    assert bool((got[VOCAB:] == 0).all())


def test_mamba_model() -> None:
    run_ranks(1, mamba)
