"""Model FLOPs against those that torch counts, and what a step says of its time."""

import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from megatron_deft.models.families import spec_from_hf
from megatron_deft.training import clock
from megatron_deft.training.clock import Clock
from megatron_deft.training.throughput import (
    model_flops,
    peak_tflops,
    throughput,
    visible_pairs,
)
from tests.convert.tiny_models import COMMON
from tests.distributed import run_ranks
from tests.training.ranks import config, metrics, train_all

SHAPE = {**COMMON, "vocab_size": 300, "num_key_value_heads": 2}
MODELS: dict[str, PretrainedConfig] = {
    "grouped queries": LlamaConfig(**SHAPE),
    "experts in some layers": Qwen3MoeConfig(
        **SHAPE, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
        mlp_only_layers=[2],
    ),
}  # fmt: skip
LENGTH = 24


@pytest.mark.parametrize("name", MODELS)
def test_model_flops_are_those_that_torch_counts(name: str) -> None:
    """transformers computes the scores above the diagonal too: they are added."""
    model_config = MODELS[name]
    spec = spec_from_hf(model_config.to_dict())
    model = AutoModelForCausalLM.from_config(model_config, attn_implementation="eager")
    if spec.experts:
        model.set_experts_implementation("eager")
    tokens = torch.randint(300, (1, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(tokens).logits.sum().backward()
    above = LENGTH * LENGTH - visible_pairs(np.array([LENGTH]))
    masked = 12 * spec.num_layers * spec.num_attention_heads * spec.head_dim * above
    ours = model_flops(spec, np.array([LENGTH]), LENGTH)
    assert ours + masked == counter.get_total_flops()


@pytest.mark.parametrize("window", [None, 1, 4, 50])
def test_visible_pairs_are_the_ones_of_the_mask(window: int | None) -> None:
    lengths = [1, 3, 7, 20]
    masks = [torch.ones(n, n).tril() for n in lengths]
    if window is not None:
        masks = [mask.triu(1 - window) for mask in masks]
    assert visible_pairs(np.array(lengths), window) == sum(int(mask.sum()) for mask in masks)


def test_windows_are_those_of_each_layer() -> None:
    spec = spec_from_hf(LlamaConfig(**SHAPE).to_dict())
    narrow = replace(spec, window=4, window_layers=(0, 3))
    lengths = np.array([10, 20])
    fewer = visible_pairs(lengths) - visible_pairs(lengths, 4)
    per_pair = 12 * spec.num_attention_heads * spec.head_dim
    spared = model_flops(spec, lengths, 0) - model_flops(narrow, lengths, 0)
    assert spared == 2 * per_pair * fewer


def test_throughput() -> None:
    spec = spec_from_hf(LlamaConfig(**SHAPE).to_dict())
    lengths = np.array([10, 20])
    got = throughput(spec, lengths, kept_tokens=6, seconds=2.0, devices=4, peak=1e-6)
    assert got["tokens_per_second"] == 15
    assert got["kept_tokens_per_second"] == 3
    assert got["tflops"] == pytest.approx(model_flops(spec, lengths, 30) / 8e12)
    assert got["kept_tflops"] == pytest.approx(model_flops(spec, lengths, 6) / 8e12)
    assert got["mfu"] == pytest.approx(got["tflops"] * 1e6)
    assert got["kept_mfu"] < got["mfu"]
    assert "mfu" not in throughput(spec, lengths, 6, 2.0, 4, None)


def test_peaks_of_known_devices() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989
    assert peak_tflops("NVIDIA H100 PCIe", "fp16") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "bf16") == 312
    assert peak_tflops("NVIDIA GB200", "bf16") == 2500
    assert peak_tflops("NVIDIA B200", "bf16") == 2250
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp32") is None
    assert peak_tflops("CPU", "bf16") is None


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes between two looks at the clock."""
    ticks = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


def test_a_clock_adds_up_its_parts(ticking: None) -> None:
    watch = Clock()
    watch.start(clock.STEP)  # 0
    for _ in range(2):
        watch("forward-compute", log_level=2).start(barrier=True)  # 1, 3
        watch("forward-compute").stop()  # 2, 4
    with watch.part(clock.DATA):  # 5
        watch.stop("never begun")
        watch.start("still runs")  # 6
    watch.stop(clock.STEP)  # 8
    reading = watch.read()
    assert dict(reading) == {clock.STEP: 8, "forward-compute": 2, clock.DATA: 2}
    assert reading["backward-compute"] == 0
    assert reading.sum(clock.COMPUTE) == 2
    watch.restart()
    watch.stop("still runs")
    assert dict(watch.read()) == {}


def test_parts_of_a_step_are_within_it(base: Path, tmp_path: Path) -> None:
    """Over two stages: rank 0, which writes the metrics, has no loss of its own."""
    keys = {"parallel.pipeline": 2, "train.steps": 2, "monitor.peak_tflops": 0.5}
    keys["data.val_files"] = f"[{base / 'val.jsonl'}]"
    run_ranks(2, train_all, [config(base, tmp_path / "run", **keys)])
    for line in metrics(tmp_path / "run"):
        step, compute = line["step_seconds"], line["forward_backward_seconds"]
        rest = ("data", "optimizer", "communication", "reduction", "loss")
        assert all(0 < line[f"{name}_seconds"] < step for name in rest)
        assert line["loss_seconds"] < compute < step
        assert line["reduction_seconds"] < line["communication_seconds"]
        assert line["peak_memory_gb"] > 0.01
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.5)
        assert line["kept_mfu"] == pytest.approx(line["kept_tflops"] / 0.5)
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / step)
        assert line["kept_tokens_per_second"] == pytest.approx(line["kept_tokens"] / step)
