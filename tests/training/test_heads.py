"""Heads of multi-token prediction in whole runs: where they come from, and where they go."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from megatron_deft.checkpoint_folder import read_manifest
from megatron_deft.convert.hf import export_hf
from megatron_deft.convert.nemo_folder import State
from megatron_deft.convert.ours import single_process
from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec, spec_from_hf
from tests.convert.tiny_models import COMMON, assert_same_tensors, tensors
from tests.distributed import run_ranks
from tests.training.ranks import (
    config,
    metrics,
    train_and_hear,
)
from tests.training.test_layouts import state, step_folder

KEYS: dict[str, Any] = {"train.steps": 1, "train.save_at_end": "true", "optim.lr": 1e-30}


def hear(cfg: Any) -> str:
    return run_ranks(1, train_and_hear, cfg)[0]


def test_heads_are_new_once_and_then_come_along(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def at(name: str, **changes: Any) -> Any:
        return config(base, tmp_path / name, **KEYS, **changes)

    first = at("first", **{"model.mtp_layers": 2})
    new = f"2 of 2 heads of multi-token prediction are new: model.load={base / 'megatron'} has none"
    said = hear(first)
    assert new in said
    assert "\ntrains 85.3k of 85.3k parameters\n" in said
    again = {"model.load": tmp_path / "first", "model.mtp_layers": 2}
    assert "multi-token" not in hear(at("again", **again))
    states = [state(step_folder(tmp_path / name, 1)) for name in ("first", "again")]
    assert sum(key.startswith("mtp.") for key in states[0]) == 20
    assert_same_tensors(*({k: s[k] for k in s if k.startswith("mtp.")} for s in states))
    more = hear(at("more", **again | {"model.mtp_layers": 3}))
    assert "1 of 3 heads of multi-token prediction are new" in more
    second = [metrics(tmp_path / name)[0]["mtp_2_loss"] for name in ("first", "again", "more")]
    assert len(set(second)) == 1
    fewer = hear(at("fewer", **again | {"model.mtp_layers": 1}))
    assert f"1 of 2 heads of multi-token prediction of model.load={tmp_path / 'first'}" in fewer
    with caplog.at_level(logging.WARNING):
        out = export_hf(tmp_path / "first", tmp_path / "out", verify=False)
    assert "its heads of multi-token prediction are left out" in caplog.text
    assert_same_tensors(tensors(out), tensors(base / "hf"))
    folder = step_folder(tmp_path / "first", 1)
    with pytest.raises(UserError, match="heads of multi-token prediction, which are not converted"):
        State(folder / "state", ModelSpec.from_json(read_manifest(folder)["spec"]))


@pytest.mark.parametrize("weight", [0.3, 1.7])
def test_what_the_losses_of_heads_count_for(tmp_path: Path, weight: float) -> None:
    """Every gradient against autograd's of the loss plus `weight` times the mean of theirs."""
    spec = spec_from_hf(LlamaConfig(**COMMON, vocab_size=96, num_key_value_heads=2).to_dict())
    keys = {"model.mtp_layers": 2, "model.mtp_loss_weight": weight}
    tokens, labels = torch.randint(96, (2, 2, 9))
    mask, places = torch.rand(2, 9), torch.arange(9).expand(2, 9)
    with single_process():
        from megatron_deft.loss.attach import attach
        from megatron_deft.training.model import build_chunks

        (model,) = build_chunks(config(tmp_path, tmp_path / "run", **keys), spec)
        attach(model, "nll", vocab_size=96)
        taken: list[torch.Tensor] = []
        model.mtp.register_forward_hook(lambda module, inputs, out: taken.append(out))

        def losses() -> torch.Tensor:
            return model(tokens, places, None, labels=labels, loss_mask=mask)

        (losses() * mask).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        losses()
        total = torch.zeros(())
        for further, hidden in enumerate(taken[-1].chunk(3)):  # the model's own, then the heads'
            logits = (hidden @ model.output_layer.weight.t())[: 9 - further].transpose(0, 1)
            wanted, weights = labels[:, further:], mask[:, further:]
            loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            total = total + (weight / 2 if further else 1) * (loss * weights.flatten()).sum()
        total.backward()
        for name, parameter in model.named_parameters():
            scale = float(parameter.grad.abs().max())
            assert scale > 0, name
            got, want = found[name], parameter.grad
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    cfg = config(base, tmp_path / "a", **{"model.mtp_layers": 1}, reduction="sample")
    with pytest.raises(UserError, match=r"reduction=sample with model\.mtp_layers=1.*token"):
        cfg.validate(1, None)
    cfg = config(base, tmp_path / "a", **{"model.mtp_layers": 1, "lora.rank": 2})
    with pytest.raises(UserError, match=r"model\.mtp_layers=1 with lora\.rank=2"):
        cfg.validate(1, None)
    hear(config(base, tmp_path / "b", **KEYS))
    other = {"train.resume": "must", "model.mtp_layers": 1, "train.steps": 2}
    cfg = config(base, tmp_path / "b", **KEYS | other)
    with pytest.raises(Exception, match=r"model\.mtp_layers=1, but .* was saved with 0"):
        hear(cfg)
