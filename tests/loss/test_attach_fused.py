"""attach(fused_linear=True): megatron-core models that make no logits, equal to those that do."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_deft import attach
from megatron_deft.errors import UserError
from tests.distributed import run_ranks
from tests.loss.test_attach import PADDED, SPEC, VOCAB, EmptyStack, batch, mtp_gpt
from tests.oracle import SPECS


def gpt(tensor: int = 1, sequence: bool = False, dtype: str = "fp32", **changes: Any) -> Any:
    from megatron_deft import platform

    platform.initialize(tensor=tensor)
    from megatron_deft.models.build import build_model, transformer_config

    spec = replace(SPEC, **changes)
    config = transformer_config(spec, tensor=tensor, sequence=sequence, dtype=dtype)
    return build_model(spec, config, vocab_pad_multiple=8 // tensor)


@contextmanager
def no_logits(model: Any) -> Iterator[None]:
    """Fail if the output layer multiplies."""
    layer = model.output_layer
    original = layer._forward_impl

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("the output layer made logits")

    layer._forward_impl = refuse
    yield
    layer._forward_impl = original


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def compare_paths(rank: int, world: int, sequence: bool, specs: list[str], tied: bool) -> None:
    model = gpt(world, sequence, tied_embeddings=tied)
    tokens, labels, positions = batch()
    upstream = torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) + 0.5
    for spec in specs:
        results = []
        for fused in (False, True):
            # 6 tokens x 16 columns at a time, of 24 kept tokens
            attachment = attach(model, spec, vocab_size=VOCAB, fused_linear=fused, chunk_tokens=3)
            assert ("without logits" in attachment.path) is fused
            if fused:
                with no_logits(model):
                    loss = model(tokens, positions, None, labels=labels)
            else:
                loss = model(tokens, positions, None, labels=labels)
            (loss * upstream).sum().backward()
            assert attachment.statistics is not None
            logits = model(tokens, positions, None)  # without labels: as ever
            assert logits.shape == (3, 12, PADDED // world)
            results.append((loss, attachment.statistics, gradients(model), logits))
            attachment.detach()
        (loss, stats, grads, logits), (loss_f, stats_f, grads_f, logits_f) = results
        assert torch.equal(logits, logits_f)
        torch.testing.assert_close(loss_f, loss, rtol=1e-5, atol=1e-6)
        for name, value in vars(stats).items():
            torch.testing.assert_close(getattr(stats_f, name), value, rtol=1e-5, atol=1e-6)
            assert bool((value[labels < 0] == 0).all()), f"{name} of ignored tokens"
        assert grads_f.keys() == grads.keys()
        for name, value in grads.items():
            scale = value.abs().max().item()
            torch.testing.assert_close(grads_f[name], value, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(("world", "sequence"), [(1, False), (2, False), (2, True)])
def test_every_gradient_is_that_of_the_logits_path(world: int, sequence: bool) -> None:
    run_ranks(world, compare_paths, sequence, SPECS, False)


def test_tied_embeddings() -> None:
    run_ranks(2, compare_paths, True, ["deft"], True)


def main_grads(rank: int, world: int, tied: bool, dtype: str) -> None:
    """Two micro-batches under megatron-core's DistributedDataParallel."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    model = gpt(world, world > 1, dtype, tied_embeddings=tied)
    tokens, labels, positions = batch()
    ddp = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        Float16Module(model.config, model) if dtype == "bf16" else model,
    )
    seen = {}
    for fused in (False, True):
        # in bf16 one tile: products of single columns would be rounded one by one
        chunk = 3 if dtype == "fp32" else None
        attach(ddp, "deft", vocab_size=VOCAB, fused_linear=fused, chunk_tokens=chunk)
        ddp.zero_grad_buffer()
        for rows in (slice(0, 1), slice(1, 3)):
            loss = ddp(tokens[rows], positions[rows], None, labels=labels[rows])
            loss.sum().backward()
            weight = (
                model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
            )
            assert weight.grad_added_to_main_grad is fused
            assert all(p.grad is None for p in model.parameters())
        seen[fused] = {n: p.main_grad.clone() for n, p in model.named_parameters()}
    for name, want in seen[False].items():
        scale = want.abs().max().item()
        assert scale > 0
        difference = (seen[True][name] - want).abs().max().item()
        assert difference <= (2e-5 if dtype == "fp32" else 2**-6) * scale, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("world", "dtype"), [(1, "fp32"), (1, "bf16"), (2, "fp32")])
def test_two_micro_batches_into_main_grad(world: int, dtype: str, tied: bool) -> None:
    run_ranks(world, main_grads, tied, dtype)


def with_logits_beside(rank: int, world: int, tied: bool, together: bool) -> None:
    """A term of the loss from logits, in the same backward or in one of its own: both count."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model = gpt(tied_embeddings=tied)
    tokens, labels, positions = batch()
    options = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
    ddp = DistributedDataParallel(model.config, options, model)
    seen = []
    for fused in (False, True):
        attach(ddp, "deft", vocab_size=VOCAB, fused_linear=fused, chunk_tokens=3)
        ddp.zero_grad_buffer()
        with ddp.no_sync():
            loss = ddp(tokens, positions, None, labels=labels).sum()
            if not together:
                loss.backward()
                loss = torch.zeros(())
            (loss + 100 * ddp(tokens, positions, None).square().mean()).backward()
        seen.append({n: p.main_grad.clone() for n, p in model.named_parameters()})
    for name, want in seen[0].items():
        scale = want.abs().max().item()
        torch.testing.assert_close(seen[1][name], want, rtol=1e-4, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_term_from_logits_beside_it(tied: bool, together: bool) -> None:
    run_ranks(1, with_logits_beside, tied, together)


def capped(rank: int, world: int) -> None:
    """Gemma 2's capped logits."""
    model = gpt(logits_softcap=0.7)
    tokens, labels, positions = batch()
    results = []
    for fused in (False, True):
        attach(model, "deft", vocab_size=VOCAB, fused_linear=fused, chunk_tokens=3)
        loss = model(tokens, positions, None, labels=labels)
        loss.sum().backward()
        results.append((loss, gradients(model)))
        assert model(tokens, positions, None).abs().max() <= 0.7
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    for name, want in results[0][1].items():
        scale = want.abs().max().item()
        torch.testing.assert_close(results[1][1][name], want, rtol=1e-4, atol=1e-5 * scale)


def test_softcap() -> None:
    run_ranks(1, capped)


def with_mtp(rank: int, world: int) -> None:
    model = mtp_gpt(2, 0.6)
    tokens, labels, positions = batch()
    mask = (labels >= 0).float()
    results = []
    for fused in (False, True):
        attachment = attach(model, "dft", vocab_size=VOCAB, fused_linear=fused, chunk_tokens=3)
        loss = model(tokens, positions, None, labels=labels, loss_mask=mask)
        assert attachment.statistics is not None
        assert torch.equal(attachment.statistics.valid, labels >= 0)
        loss.sum().backward()
        results.append((loss, gradients(model)))
        assert [bool(kept.any()) for _, kept in attachment.heads] == [True, True]
        attachment.detach()
        assert not model._forward_pre_hooks
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    assert results[0][1]["mtp.layers.1.eh_proj.weight"].abs().max() > 0
    for name, want in results[0][1].items():
        scale = want.abs().max().item()
        torch.testing.assert_close(results[1][1][name], want, rtol=1e-4, atol=1e-5 * scale)


def test_every_head_of_multi_token_prediction() -> None:
    run_ranks(1, with_mtp)


def mamba(rank: int, world: int) -> None:
    from megatron_deft import platform

    platform.initialize()
    from megatron.core.models.mamba import MambaModel
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_deft.models.build import transformer_config

    model = MambaModel(
        config=transformer_config(SPEC),
        mamba_stack_spec=ModuleSpec(module=EmptyStack),
        vocab_size=PADDED,
        max_sequence_length=32,
        hybrid_override_pattern="*-",
    )
    tokens, labels, positions = batch()
    results = []
    for fused in (False, True):
        attach(model, "deft", vocab_size=VOCAB, fused_linear=fused)
        loss = model(tokens, positions, None, labels=labels)
        loss.sum().backward()
        results.append((loss, gradients(model)["output_layer.weight"]))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_mamba_model() -> None:
    run_ranks(1, mamba)


def comings_and_goings(rank: int, world: int) -> None:
    """Attached again, detached, failed in between: the output layer is always what it should be."""
    model = gpt()
    tokens, labels, positions = batch()
    own = model(tokens, positions, None, labels=labels.clamp(min=0))
    attach(model, "nll", vocab_size=VOCAB)
    nll = model(tokens, positions, None, labels=labels.clamp(min=0))
    first = attach(model, "deft", vocab_size=VOCAB, fused_linear=True)
    with pytest.raises(UserError, match="labels: expected 0 to"):
        model(tokens, positions, None, labels=labels.clamp(max=VOCAB) + VOCAB)
    assert model(tokens, positions, None).shape == (3, 12, PADDED)  # not left open
    second = attach(model, "nll", vocab_size=VOCAB, fused_linear=True)
    with no_logits(model), torch.no_grad():
        loss = model(tokens, positions, None, labels=labels.clamp(min=0))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, nll)
    first.detach()  # it was replaced: the second stays
    with no_logits(model):
        model(tokens, None, None, None, labels)  # by position
    third = attach(model, "nll", vocab_size=VOCAB)
    assert third.path == "logits"
    model(tokens, positions, None, labels=labels)
    second.detach()
    third.detach()
    assert torch.equal(model(tokens, positions, None, labels=labels.clamp(min=0)), own)
    assert "forward" not in vars(model.output_layer)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_attached_again_and_detached() -> None:
    run_ranks(1, comings_and_goings)


def obstacles(rank: int, world: int) -> None:
    from megatron.core.models.gpt import GPTModel

    model = gpt()
    tokens, labels, positions = batch()
    handle = model.output_layer.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(UserError, match=r"fused_linear=True.*hooks.*use fused_linear=False"):
        attach(model, "deft", vocab_size=VOCAB, fused_linear=True)
    attachment = attach(model, "deft", vocab_size=VOCAB, fused_linear="auto")
    assert attachment.path.startswith("logits (the output layer has hooks")
    model(tokens, positions, None, labels=labels)
    handle.remove()

    class Scaled(GPTModel):
        def _postprocess(self, *args: Any, **kwargs: Any) -> Any:
            return super()._postprocess(*args, **kwargs)

    model.__class__ = Scaled
    with pytest.raises(UserError, match=r"Scaled\._postprocess is not GPTModel's"):
        attach(model, "deft", vocab_size=VOCAB, fused_linear=True)
    model.__class__ = GPTModel
    model.output_layer.forward = lambda *_: None
    with pytest.raises(UserError, match="has a forward of its own"):
        attach(model, "deft", vocab_size=VOCAB, fused_linear=True)
    del model.output_layer.forward
    attach(model, "deft", vocab_size=VOCAB, fused_linear=True)
    early = model.output_layer.register_forward_pre_hook(lambda module, inputs: None)
    model(tokens, positions, None, labels=labels)  # what comes before it wants no logits
    early.remove()
    late = model.output_layer.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(UserError, match=r"hooks.*since attach; attach again without it"):
        model(tokens, positions, None, labels=labels)
    assert model(tokens, positions, None).shape == (3, 12, PADDED)
    late.remove()
    attachment = attach(model, "deft", vocab_size=VOCAB, fused_linear="auto")
    assert attachment.path == f"logits (the output layer is small, {PADDED} x 16)"
    with pytest.raises(UserError, match="chunk_tokens: expected an int >= 1"):
        attach(model, "deft", vocab_size=VOCAB, fused_linear=True, chunk_tokens=0)
    model.output_layer.skip_bias_add = True
    with pytest.raises(UserError, match="hands its bias on"):
        attach(model, "deft", vocab_size=VOCAB, fused_linear=True)
    model.output_layer.skip_bias_add = False
    model.config.defer_embedding_wgrad_compute = True
    with pytest.raises(UserError, match="config has defer_embedding_wgrad_compute"):
        attach(model, "deft", vocab_size=VOCAB, fused_linear=True)
    with pytest.raises(UserError, match=r"legal are True, False, 'auto'"):
        attach(model, "deft", vocab_size=VOCAB, fused_linear="yes")  # type: ignore[arg-type]


def test_what_it_refuses() -> None:
    run_ranks(1, obstacles)
