"""Model FLOPs against those that torch counts, and what a step says of its time."""

import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from megatron_deft.convert.ours import single_process
from megatron_deft.models.adapters import TARGETS, Adapters
from megatron_deft.models.families import ModelSpec, spec_from_hf
from megatron_deft.training import clock
from megatron_deft.training.base import read_base
from megatron_deft.training.clock import Clock, Reading, measurements, time_head
from megatron_deft.training.throughput import (
    model_flops,
    peak_tflops,
    throughput,
    visible_pairs,
)
from tests.convert.tiny_models import COMMON
from tests.distributed import run_ranks
from tests.training.clock_ranks import step_with_a_late_stage
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
    masked = 3 * spec.num_layers * flops_above_the_diagonal(spec)
    ours = model_flops(spec, np.array([LENGTH]), LENGTH)
    assert ours + masked == counter.get_total_flops()


def flops_above_the_diagonal(spec: ModelSpec) -> float:
    """Of one layer's forward."""
    above = LENGTH * LENGTH - visible_pairs(np.array([LENGTH]))
    return 4 * spec.num_attention_heads * spec.head_dim * above


# Targets; passes of the 4 layers' attention, and routers with a backward pass: of what comes before
# the first adapter there is none. megatron-core makes the routers' own gradients, though frozen.
ADAPTED = [
    (TARGETS, 12, 3),
    (("linear_qkv",), 12, 3),
    (("linear_proj",), 10, 3),
    (("linear_fc2",), 10, 2),
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("targets", "scores", "routers"), ADAPTED)
def test_frozen_weights_have_no_gradient_and_adapters_their_products(
    name: str, targets: tuple[str, ...], scores: int, routers: int
) -> None:
    spec, adapters = spec_from_hf(MODELS[name].to_dict()), Adapters(5, 1.0, False, 0.0, targets)
    ours = model_flops(spec, np.array([LENGTH]), LENGTH, adapters)
    unneeded = scores * flops_above_the_diagonal(spec)
    unneeded += routers * 2 * LENGTH * spec.hidden_size * spec.experts
    assert ours + unneeded == flops_of_our_model(spec, adapters, 0)


@pytest.mark.parametrize("name", MODELS)
def test_prediction_heads_have_a_projection_a_layer_and_the_output_layer(name: str) -> None:
    spec = spec_from_hf(MODELS[name].to_dict())
    for heads in (0, 2):
        ours = model_flops(spec, np.array([LENGTH]), LENGTH, None, heads)
        masked = 3 * (spec.num_layers + heads) * flops_above_the_diagonal(spec)
        assert ours + masked == flops_of_our_model(spec, None, heads)


def flops_of_our_model(spec: ModelSpec, adapters: Adapters | None, heads: int) -> int:
    """Forward and backward of what a run trains, the whole table of scores included."""
    with single_process():
        from megatron_deft.loss.attach import attach
        from megatron_deft.models.build import build_model, transformer_config
        from megatron_deft.models.lora import train_adapters_alone

        config = transformer_config(spec, mtp_layers=heads)
        model: Any = build_model(spec, config, vocab_pad_multiple=1, adapters=adapters)
        if adapters is not None:
            train_adapters_alone(model, seed=1)
        attach(model, "nll", vocab_size=spec.vocab_size)
        tokens, places = torch.randint(300, (1, LENGTH)), torch.arange(LENGTH)[None]
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(tokens, places, None, labels=tokens).sum().backward()
    return counter.get_total_flops()


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
    adapters = Adapters(2, 4.0, False, 0.0, TARGETS)
    for special in ({"adapters": adapters}, {"mtp_layers": 2}):
        other = throughput(spec, lengths, 6, 2.0, 4, None, **special)
        assert other["tflops"] == pytest.approx(model_flops(spec, lengths, 30, **special) / 8e12)
        assert other["tflops"] != pytest.approx(got["tflops"], rel=0.1)
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


def test_loss_seconds_are_of_the_output_layer_and_the_loss() -> None:
    """Forward and backward; the layers of prediction heads are none of it."""
    forward, backward = clock.HEAD
    assert what_happens(heads=0) == [
        "decoder", f"start {forward}", "output", f"stop {forward}",
        f"start {backward}", "output gradient", f"stop {backward}", "decoder gradient",
    ]  # fmt: skip
    assert what_happens(heads=2) == [
        "decoder", "heads", f"start {forward}", "output", "output", "output", f"stop {forward}",
        f"start {backward}", "output gradient", f"stop {backward}",
        "heads gradient", "decoder gradient",
    ]  # fmt: skip


class ListClock(Clock):
    """Writes down when it is started and stopped."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def start(self, name: str) -> None:
        self.events.append(f"start {name}")

    def stop(self, name: str) -> None:
        self.events.append(f"stop {name}")


def what_happens(heads: int) -> list[str]:
    """In a forward and backward pass: ends of modules, and the gradients of their weights."""
    events: list[str] = []
    spec = spec_from_hf(MODELS["grouped queries"].to_dict())
    with single_process():
        from megatron_deft.loss.attach import attach
        from megatron_deft.models.build import build_model, transformer_config

        config = transformer_config(spec, mtp_layers=heads)
        model: Any = build_model(spec, config, vocab_pad_multiple=1)
        attach(model, "nll", vocab_size=spec.vocab_size)
        parts = {"decoder": model.decoder, "output": model.output_layer}
        last = {"decoder": model.decoder.final_layernorm, "output": model.output_layer}
        if heads:
            parts["heads"], last["heads"] = model.mtp, model.mtp.layers[-1].final_layernorm
        for name, part in parts.items():
            part.register_forward_hook(lambda *_, name=name: events.append(name))
            last[name].weight.register_hook(lambda _, name=name: events.append(f"{name} gradient"))
        time_head([model], ListClock(events))
        tokens, places = torch.randint(300, (1, LENGTH)), torch.arange(LENGTH)[None]
        model(tokens, places, None, labels=tokens).sum().backward()
    return events


def test_measurements_add_up_their_parts() -> None:
    parts = {
        clock.STEP: 100.0, clock.DATA: 1.0, clock.SCHEDULE: 80.0,
        "forward-compute": 20.0, "backward-compute": 30.0,
        "head-forward": 4.0, "head-backward": 6.0,
        clock.OPTIMIZER: 15.0, clock.GATHER: 7.0,
        "all-grads-sync": 2.0, "embedding-grads-all-reduce": 3.0,
    }  # fmt: skip
    with single_process():
        found = measurements(Reading(parts))
    assert found.pop("peak_memory_gb") > 0
    assert found == {
        "step_seconds": 100, "data_seconds": 1, "forward_backward_seconds": 50, "loss_seconds": 10,
        "optimizer_seconds": 15 - 7, "communication_seconds": 80 - 50 + 7, "reduction_seconds": 5,
    }  # fmt: skip


def test_waiting_for_another_stage_is_communication(base: Path, tmp_path: Path) -> None:
    """With a single micro-batch the first stage has nothing else to do while the last sleeps."""
    keys = {"parallel.pipeline": 2, "train.steps": 1, "train.micro_batch": 8}
    late = 1.0
    cfg = config(base, tmp_path / "run", **keys)
    for line in run_ranks(2, step_with_a_late_stage, cfg, late):
        assert line["communication_seconds"] >= late
        assert line["forward_backward_seconds"] >= late


RUNS: dict[str, tuple[dict[str, Any], int]] = {  # keys; passes of the output layer
    "whole": ({}, 3),
    "adapters": ({"lora.rank": 2}, 2),
    "heads": ({"model.mtp_layers": 2}, 3 * (1 + 2)),
}


@pytest.fixture(scope="module")
def lines(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Metrics of RUNS over two stages: rank 0, which writes them, has no loss of its own."""
    root = tmp_path_factory.mktemp("runs")
    keys = {"parallel.pipeline": 2, "train.steps": 2, "monitor.peak_tflops": 0.5}
    keys["data.val_files"] = f"[{base / 'val.jsonl'}]"
    configs = [config(base, root / name, **keys, **own) for name, (own, _) in RUNS.items()]
    run_ranks(2, train_all, configs)
    return {name: metrics(root / name) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_parts_of_a_step_are_within_it(lines: dict[str, list[dict[str, Any]]], name: str) -> None:
    for line in lines[name]:
        step, compute = line["step_seconds"], line["forward_backward_seconds"]
        rest = ("data", "optimizer", "communication", "reduction", "loss")
        assert all(0 < line[f"{part}_seconds"] < step for part in rest)
        assert line["loss_seconds"] < compute < step
        assert line["reduction_seconds"] < line["communication_seconds"]
        assert line["peak_memory_gb"] > 0.01
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.5)
        assert line["kept_mfu"] == pytest.approx(line["kept_tflops"] / 0.5)
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / step)
        assert line["kept_tokens_per_second"] == pytest.approx(line["kept_tokens"] / step)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_counts_what_it_trains(
    base: Path, lines: dict[str, list[dict[str, Any]]], name: str
) -> None:
    """By the output layer, through which the dropped tokens go in tflops alone."""
    spec, passes = read_base(config(base, base / "run").model).spec, RUNS[name][1]
    for line in lines[name]:
        dropped = line["tokens"] - line["kept_tokens"]
        assert dropped > 0
        flops = 2 * passes * spec.hidden_size * spec.vocab_size * dropped
        found = (line["tflops"] - line["kept_tflops"]) * 1e12 * line["step_seconds"] * 2
        assert found == pytest.approx(flops)
