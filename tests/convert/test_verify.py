"""The proof can fail: scrambled heads and dropped rotary scaling are caught, the layer is named."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_deft.convert.hf import import_hf
from megatron_deft.convert.verify import Report, require_equal, single_process, verify
from megatron_deft.data.tiny import make_tiny_llama
from megatron_deft.errors import UserError
from megatron_deft.platform import initialize, shutdown
from tests.convert.tiny_models import CONFIGS, make


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("hf") / "model", CONFIGS["llama_biases_odd_vocab"])


@pytest.fixture(scope="module")
def weights(source: Path) -> Path:
    return import_hf(source, source.parent / "weights", verify=False)


def spoiled(source: Path, out: Path, spoil: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    spoil(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def swap_two_heads(tensors: dict[str, Tensor]) -> None:
    """Query heads 1 and 2 of layer 2, weight and bias: they belong to different groups."""
    for kind in ("weight", "bias"):
        q = tensors[f"model.layers.2.self_attn.q_proj.{kind}"]
        q[8:24] = torch.cat([q[16:24], q[8:16]])


def swap_gate_and_up(tensors: dict[str, Tensor]) -> None:
    names = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def one_nan(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.3.mlp.down_proj.bias"][0] = float("nan")


def one_row_of_the_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"][-1] += 0.01


def test_equal_models(source: Path, weights: Path) -> None:
    report = verify(source, weights)
    assert report.ok
    assert report.first_difference is None
    assert list(report.stages) == [
        "embedding",
        "layer 0",
        "layer 1",
        "layer 2",
        "layer 3",
        "final norm",
        "logits",
    ]
    assert max(report.stages.values()) < 1e-5
    assert report.tokens == 128


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (swap_two_heads, "layer 2"),
        (swap_gate_and_up, "layer 1"),
        (one_nan, "layer 3"),
        (one_row_of_the_head, "logits"),
    ],
)
def test_a_different_model_is_caught_and_the_layer_named(
    source: Path,
    weights: Path,
    tmp_path: Path,
    spoil: Callable[[dict[str, Tensor]], None],
    where: str,
) -> None:
    report = verify(spoiled(source, tmp_path / "hf", spoil), weights)
    assert not report.ok
    assert report.first_difference == where


def test_dropped_rotary_scaling_is_caught(source: Path, weights: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"logits differ by .* of their scale .* first at layer 0"):
        require_equal(tmp_path / "hf", weights)


def test_prompts_are_read_with_the_folders_tokenizer(tmp_path: Path) -> None:
    hf = make_tiny_llama(tmp_path / "hf", ["to be or not to be"], layers=1, hidden_size=16)
    weights = import_hf(hf, tmp_path / "weights", verify=False)
    with_sentence, with_prompts = verify(hf, weights), verify(hf, weights, ["ab", "c"])
    assert with_sentence.ok
    assert with_prompts.ok
    assert with_sentence.tokens > with_prompts.tokens > 256


def test_prompts_need_a_tokenizer(source: Path, weights: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer"):
        verify(source, weights, ["hello"])


def test_rounding_is_part_of_the_comparison(source: Path, tmp_path: Path) -> None:
    """fp32 weights converted to bf16 equal transformers' weights in bf16, not those in fp32."""
    weights = import_hf(source, tmp_path / "weights", dtype="bf16", verify=False)
    assert verify(source, weights).ok
    assert not verify(source, weights, dtype="fp32").ok


def test_report_takes_nan_as_a_difference() -> None:
    assert not Report({"logits": float("nan")}, 1).ok
    assert (
        Report({"embedding": float("nan"), "logits": float("nan")}, 1).first_difference
        == "embedding"
    )


def test_leaves_nothing_running_and_no_random_number_drawn(
    source: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    assert verify(source, weights).ok
    assert not dist.is_initialized()
    from megatron.core import parallel_state

    assert not parallel_state.model_parallel_is_initialized()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(numpy.random.get_state())) == before[1:]


def test_works_where_megatron_runs_already(source: Path, weights: Path) -> None:
    initialize()
    try:
        from megatron.core import parallel_state

        assert verify(source, weights).ok
        assert dist.is_initialized()
        assert parallel_state.model_parallel_is_initialized()
    finally:
        shutdown()
    assert not dist.is_initialized()


def test_works_where_only_torch_distributed_runs(source: Path, weights: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert verify(source, weights).ok
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_stops_what_it_started_when_the_block_fails() -> None:
    def fail() -> None:
        with single_process():
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not dist.is_initialized()
