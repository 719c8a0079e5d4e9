"""The loss function by itself: gradients against float64, and what it refuses."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="pip install accelerate")
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from megatron_deft.errors import UserError
from megatron_deft.integrations.transformers import ObjectiveCallback, compute_loss_func
from tests.oracle import SPECS, loss_and_grad


def call(spec: str, logits: Tensor, labels: Tensor, items: Any = None, **options: Any) -> Tensor:
    return compute_loss_func(spec, inplace_backward=False, **options)(
        SimpleNamespace(logits=logits), labels, items
    )


def example(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 9, 23, generator=generator) * 2
    labels = torch.randint(0, 23, (3, 9), generator=generator)
    sure = nn.functional.one_hot(labels[:, 1:], 23)[:, ::2]  # every other token is likely
    logits[:, :-1][:, ::2] += 4 * sure
    labels[0, :4] = labels[1, 6:] = labels[:, 0] = -100
    return logits.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("spec", SPECS)
def test_loss_and_gradient_are_those_of_float64(spec: str) -> None:
    logits, labels = example()
    shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1).flatten()
    values, _, keep, _ = loss_and_grad(
        spec, logits.flatten(0, 1), shifted, 23, torch.ones(len(shifted))
    )
    items = int((shifted != -100).sum())
    for given in (None, items, torch.tensor(items), torch.tensor(float(items))):
        logits.grad = None
        loss = call(spec, logits, labels, given)
        loss.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(values.sum().item() / keep.sum().item(), rel=1e-5)
        _, wanted, _, _ = loss_and_grad(
            spec, logits.flatten(0, 1), shifted, 23, torch.ones(len(shifted)) / keep.sum()
        )
        torch.testing.assert_close(logits.grad.double().flatten(0, 1), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    logits, labels = example(dtype)
    loss = call("deft", logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(call("deft", logits.float(), labels).item(), rel=1e-6)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


def test_outputs_may_be_a_mapping_an_object_or_a_tuple() -> None:
    logits, labels = example()
    loss = compute_loss_func("dft")
    wanted = call("dft", logits, labels).item()
    with torch.no_grad():
        for outputs in (
            {"logits": logits},
            SimpleNamespace(logits=logits),
            (logits,),
            (torch.tensor(1.0), logits),
            (logits, ("key", "value")),
        ):
            assert loss(outputs, labels).item() == pytest.approx(wanted)
    assert loss.statistics is not None
    assert loss.statistics.p.shape == labels.shape


def test_nothing_but_ignored_labels_is_zero_with_a_graph() -> None:
    logits, labels = example()
    for items in (None, 0, torch.tensor(0), 12):
        logits.grad = None
        loss = call("deft", logits, torch.full_like(labels, -100), items)
        assert loss.item() == 0.0
        loss.backward()
        assert logits.grad is not None
        assert not logits.grad.any()


def test_the_labels_are_left_as_they_are() -> None:
    logits, labels = example()
    kept = labels.clone()
    call("deft", logits, labels).backward()
    assert torch.equal(labels, kept)


def test_the_gradient_is_written_over_the_logits() -> None:
    hidden, labels = torch.randn(3, 9, 5, requires_grad=True), example()[1]
    weight = torch.randn(23, 5, requires_grad=True)
    logits = hidden @ weight.T
    before = logits.detach().clone()
    compute_loss_func("deft")(SimpleNamespace(logits=logits), labels).backward()
    assert not torch.equal(logits, before)
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    call("deft", hidden @ weight.T, labels).backward()
    torch.testing.assert_close(grads, (hidden.grad, weight.grad))


def test_replicas_of_data_parallel() -> None:
    """Trainer hands one count per replica, then multiplies the loss by their number."""
    logits, labels = example()
    items = int((labels[:, 1:] != -100).sum())
    wanted = call("deft", logits, labels).item()
    replicated = torch.tensor(items).unsqueeze(0).expand(2, -1)
    assert 2 * call("deft", logits, labels, replicated).item() == pytest.approx(wanted)
    top = call("OnlyTopP-0.1", logits, labels).item()
    assert 2 * call("OnlyTopP-0.1", logits, labels, replicated).item() == pytest.approx(top)


def test_dropped_tokens_leave_the_mean_where_their_number_is_known() -> None:
    logits, labels = example()
    items = int((labels[:, 1:] != -100).sum())
    exact = call("OnlyTopP-0.1", logits, labels, items).item()
    by_label = call("OnlyTopP-0.1", logits, labels, items, reduction="label").item()
    loss = compute_loss_func("OnlyTopP-0.1")
    with torch.no_grad():
        loss(SimpleNamespace(logits=logits), labels)
    assert loss.statistics is not None
    kept = int(loss.statistics.keep.sum())
    assert 0 < kept < items
    assert by_label * items == pytest.approx(exact * kept)
    with pytest.raises(UserError, match=f"sees {items} of the step's {items + 5} labels"):
        call("OnlyTopP-0.1", logits, labels, items + 5)
    ignored = torch.full_like(labels, -100)
    assert call("OnlyTopP-0.1", logits, ignored, items).item() == 0.0  # another call saw them all
    parts = [
        call("OnlyTopP-0.1", logits[i : i + 1], labels[i : i + 1], items, reduction="label")
        for i in range(3)
    ]
    assert sum(part.item() for part in parts) == pytest.approx(by_label)


def test_an_encoder_decoder_is_refused() -> None:
    """Its decoder is fed the labels shifted, so they stand where they are predicted."""
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=23, decoder_start_token_id=0, pad_token_id=0, **sizes)
    )
    labels = example()[1]
    outputs, told = model(input_ids=labels.clamp(min=0), labels=labels), "is an encoder-decoder"
    loss = compute_loss_func("deft")
    with pytest.raises(UserError, match=told):
        loss(outputs, labels)
    with pytest.raises(UserError, match=told):  # a tuple does not say what it is from
        loss((outputs.logits,), labels, trainer=SimpleNamespace(model=model))
    callback, arguments = ObjectiveCallback(loss), TrainingArguments(use_cpu=True)
    with pytest.raises(UserError, match=told):
        callback.on_train_begin(arguments, None, None, model=model)
    causal = LlamaForCausalLM(
        LlamaConfig(vocab_size=23, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=2)
    )  # fmt: skip
    callback.on_train_begin(arguments, None, None, model=causal)
    outputs = causal(input_ids=labels.clamp(min=0))
    assert loss(outputs, labels, trainer=SimpleNamespace(model=causal)).item() > 0


def test_what_cannot_be_honoured_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = example()
    loss = compute_loss_func("deft")
    with pytest.raises(UserError, match="use_liger_kernel=False"):
        loss({"loss": torch.tensor(1.0)}, labels)
    with pytest.raises(UserError, match="no logits"):
        loss(SimpleNamespace(loss=torch.tensor(1.0), logits=None), labels)
    with pytest.raises(UserError, match="no labels"):
        loss({"logits": logits}, None)
    with pytest.raises(UserError, match=r"logits \[3, 8, 23\] for labels \[3, 9\]"):
        loss({"logits": logits[:, 1:]}, labels)
    balanced = {"logits": logits, "aux_loss": torch.tensor(1.0)}
    with pytest.raises(UserError, match="output_router_logits=False"):
        loss(balanced, labels)
    with torch.no_grad():
        loss(balanced, labels, trainer=SimpleNamespace())
    with pytest.raises(UserError, match="loss_scale"):
        loss({"logits": logits}, labels, loss_scale=torch.ones(27))
    smoothed = SimpleNamespace(args=TrainingArguments(label_smoothing_factor=0.1, use_cpu=True))
    with pytest.raises(UserError, match=r"label_smoothing_factor=0\.1 has no effect"):
        loss({"logits": logits}, labels, trainer=smoothed)
    split = SimpleNamespace(template=SimpleNamespace(sequence_parallel_size=2))
    with pytest.raises(UserError, match="sequence_parallel_size=2"):
        loss({"logits": logits}, labels, trainer=split)
    for reduction in ("micro_batch", "sample", "mean"):
        with pytest.raises(UserError, match="legal are token, label"):
            compute_loss_func("deft", reduction=reduction)
    with pytest.raises(UserError, match="unknown objective"):
        compute_loss_func("cross-entropy")
    from accelerate import ParallelismConfig
    from accelerate.state import AcceleratorState

    layout = ParallelismConfig(cp_size=2)
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", layout)
    with pytest.raises(UserError, match="cp_size=2"):
        loss({"logits": logits}, labels)
