"""Rotary positions, windows and settings that few tokens, or none, give away."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig

from megatron_deft.convert.hf import import_hf
from megatron_deft.convert.stages import Facts
from megatron_deft.convert.tokens import make_batch
from megatron_deft.convert.verify import require_equal, verify
from megatron_deft.errors import UserError
from megatron_deft.models import attention
from tests.convert.spoiling import massive, reconfigured, spoiled
from tests.convert.tiny_models import COMMON, CONFIGS, LLAMA3_SCALING, make, rotary


def test_a_wrong_theta_that_no_logit_shows(source: Path, tmp_path: Path) -> None:
    hf = spoiled(source, tmp_path / "hf", massive)
    weights = import_hf(hf, tmp_path / "weights")
    report = verify(reconfigured(hf, tmp_path / "other", **rotary(5500.0, LLAMA3_SCALING)), weights)
    assert report.relative < 1e-4, "the logits show it"
    assert report.first_difference == "rotary positions"


def test_settings_that_no_logit_shows(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", CONFIGS["gemma2"])
    hf = reconfigured(plain, tmp_path / "hf", attn_logit_softcapping=5000.0)
    weights = import_hf(hf, tmp_path / "weights")
    report = verify(reconfigured(hf, tmp_path / "other", attn_logit_softcapping=None), weights)
    assert report.logits_ok
    assert report.faults == ["settings differ: attention_softcap None and 5000.0"]
    assert not report.ok


def windowed(folder: Path, **fields: Any) -> Path:
    sizes = {**COMMON, "max_position_embeddings": 2048, "num_key_value_heads": 2}
    return make(folder, MistralConfig(**sizes, vocab_size=128, sliding_window=300, **fields))


def test_a_window_that_the_family_does_not_know(source: Path, tmp_path: Path) -> None:
    """A Mistral saved as a Llama: transformers keeps the key and never looks at it."""
    hf = reconfigured(source, tmp_path / "hf", sliding_window=16)
    assert import_hf(hf, tmp_path / "weights").is_dir()


def test_windows_of_another_size_are_told(tmp_path: Path) -> None:
    hf = windowed(tmp_path / "hf")
    weights = import_hf(hf, tmp_path / "weights")
    for window in (None, 299):
        other = reconfigured(hf, tmp_path / str(window), sliding_window=window)
        report = verify(other, weights)
        assert f"sliding window of layer 0 {window} and 300" in report.settings
        assert len(report.settings) == COMMON["num_hidden_layers"]
        assert not report.ok


@pytest.mark.parametrize("wrong", [1, -1])
def test_a_window_that_is_wrong_by_one_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    """Though no row of the check is as long as the window is."""
    visible = attention._visible
    monkeypatch.setattr(
        attention,
        "_visible",
        lambda length, places, window, device: visible(length, places, window + wrong, device),
    )
    with pytest.raises(UserError, match=r"first at layer 0 \(attention output\)"):
        import_hf(windowed(tmp_path / "hf"), tmp_path / "weights")


def test_a_wrong_theta_is_named(source: Path, weights: Path, tmp_path: Path) -> None:
    wrong = rotary(10000.0, LLAMA3_SCALING)
    report = verify(reconfigured(source, tmp_path / "hf", **wrong), weights)
    assert report.first_difference == "rotary positions"
    assert report.tensors.ok
    assert not report.stages["layer 0"] <= 1e-4


def test_dropped_rotary_scaling_is_caught(source: Path, weights: Path, tmp_path: Path) -> None:
    other = reconfigured(source, tmp_path / "hf", **rotary(5000.0))
    with pytest.raises(UserError, match=r"logits differ by .* scale, first at rotary positions"):
        require_equal(other, weights)


def with_linear_scaling(folder: Path, factor: float, positions: int) -> Path:
    rope = rotary(10000.0, {"rope_type": "linear", "factor": factor})
    sizes = {**COMMON, "num_hidden_layers": 1, "max_position_embeddings": positions}
    return make(folder, LlamaConfig(**sizes, vocab_size=64, **rope))


@pytest.mark.parametrize(("positions", "same"), [(256, True), (131072, False)])
def test_far_positions_are_compared(tmp_path: Path, positions: int, same: bool) -> None:
    """A scaling that is wrong by a millionth cannot be seen within 256 positions."""
    a = with_linear_scaling(tmp_path / "a", 4.0, positions)
    b = with_linear_scaling(tmp_path / "b", 4.000004, positions)
    report = verify(a, b)
    assert (report.stages["rotary positions"] <= 1e-4) is same
    assert report.logits_ok is same
    assert report.furthest == positions - 1


def test_both_models_are_given_the_far_positions(tmp_path: Path) -> None:
    hf = with_linear_scaling(tmp_path / "hf", 4.0, 131072)
    report = verify(hf, import_hf(hf, tmp_path / "weights", verify=False))
    assert report.ok
    assert report.furthest == 131071


def test_positions() -> None:
    short = make_batch([], Facts(1, 8, 50, 100), None)
    assert short.positions.tolist() == list(range(100))
    assert short.runs() == [(100, 0)]
    far = make_batch([], Facts(1, 8, 50, 8192), None)
    assert far.positions[:192].tolist() == list(range(192))
    assert far.positions[-1] == 8191
    assert bool((far.positions.diff() > 0).all())
    assert far.runs()[0] == (193, 0)
    assert len(far.runs()) == 64


def test_positions_reach_to_what_yarn_stretches_the_context_to(tmp_path: Path) -> None:
    """max_position_embeddings left at the length of the pretraining, as Qwen2.5's card has it."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    sizes = {**COMMON, "num_hidden_layers": 1, "max_position_embeddings": 512}
    hf = make(tmp_path / "hf", LlamaConfig(**sizes, vocab_size=64, **rotary(10000.0, yarn)))
    assert verify(hf, import_hf(hf, tmp_path / "weights", verify=False)).furthest == 2047
