"""Runs with experts and virtual pipelines: one process's numbers, and state that moves exactly."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_deft.checkpoint_folder import read_manifest
from megatron_deft.convert.hf import export_hf
from megatron_deft.convert.mapping import Slot
from megatron_deft.convert.state import StateReader
from megatron_deft.loss.metrics import METRICS
from tests.convert.tiny_models import assert_same_tensors, tensors
from tests.distributed import run_ranks
from tests.training.layouts import (
    BF16,
    COUNTED,
    CP2,
    DROPOUT,
    EMBEDDING,
    EP2,
    EP4,
    ETP1,
    FIRST,
    FUSED,
    GATHER,
    LAST,
    LOSS,
    MODELS,
    MTP,
    OVERLAP,
    PACKED,
    PLAIN,
    PP2,
    PP3,
    RECOMPUTE,
    SEQUENCE,
    STILL,
    TP2,
    VPP2,
    Keys,
    make_models,
)
from tests.training.ranks import config, metrics, move, train_all

RANKS = 4
OTHER_NUMBERS = {*BF16, *DROPOUT, *STILL}  # than one process's
# Four micro-batches per rank where there are two data-parallel ranks, two where there are four.
COMMON_KEYS: Keys = {"train.global_batch": 16, "train.save_every": 1, "optim.warmup_ratio": 0}


class Run(NamedTuple):
    """A run of three steps from the start, and the layouts its second checkpoint then moves to."""

    model: str
    keys: Keys
    hops: tuple[Keys, ...] = ()
    ranks: int = RANKS

    @property
    def form(self) -> str:
        """What the run in one process that it equals is called."""
        forms = {"packed": "data.pack", "heads": "model.mtp_layers"}
        return " ".join([self.model, "whole", *(n for n, key in forms.items() if key in self.keys)])


RUNS: dict[str, Run] = {
    "dense VPP2": Run("dense", VPP2, (TP2, VPP2, {})),
    "dense VPP2 plain bf16": Run("dense", VPP2 | PLAIN | BF16, (TP2,)),
    "experts EP2": Run("experts", EP2, ({}, SEQUENCE | EP2, PP2, VPP2 | EP2, SEQUENCE)),
    "experts VPP2 EP2": Run("experts", VPP2 | EP2 | OVERLAP | FUSED),
    "experts TP2 EP2": Run("experts", SEQUENCE | EP2),
    "experts TP2 EP2 bf16": Run("experts", SEQUENCE | EP2 | BF16, (PP2 | EP2,)),
    "experts PP2 EP2 plain": Run("experts", PP2 | EP2 | PLAIN, (EP4,)),
    "experts EP2 plain bf16": Run("experts", EP2 | PLAIN | BF16, ({},)),
    "experts VPP2 EP2 dropout": Run("experts", VPP2 | EP2 | DROPOUT, (VPP2 | EP2,)),
    "dense VPP2 packed": Run("dense", VPP2 | PACKED | FUSED),
    "experts VPP2 EP2 packed": Run("experts", VPP2 | EP2 | PACKED | GATHER),
    "experts TP2 EP2 packed": Run("experts", SEQUENCE | EP2 | PACKED),
    "experts CP2 EP4": Run("experts", CP2 | EP4 | FUSED),
    "five PP2 loss": Run("five", PP2 | LOSS, ({}, TP2 | PP2 | {LAST: 1})),
    "five PP3 loss packed": Run("five", PP3 | LOSS | PACKED, (PP2 | EMBEDDING,), 3),
    "six VPP2 embedding loss": Run("six", VPP2 | COUNTED | GATHER, (VPP2 | {FIRST: 2, LAST: 4},)),
    "six VPP2 first": Run("six", VPP2 | {FIRST: 4}, (VPP2 | COUNTED, {})),
    "six PP3 first last": Run("six", PP3 | {FIRST: 1, LAST: 2} | FUSED, (PP2,), 3),
    "experts PP2 EP2 gather": Run("experts", PP2 | EP2 | GATHER | FUSED),
    "experts TP2 ETP1 EP4": Run("experts", ETP1 | EP4, (ETP1 | EP4, {})),
    "experts TP2 ETP1 EP2": Run("experts", ETP1 | EP2),
    "experts TP2 ETP1": Run("experts", ETP1, (ETP1 | EP2,)),
    "dense TP2 sequence heads": Run("dense", SEQUENCE | MTP | RECOMPUTE, (PP2 | TP2,)),
    "dense PP2 heads packed": Run("dense", PP2 | MTP | PACKED | FUSED, (TP2,)),
    "dense CP2 heads": Run("dense", CP2 | MTP),
    "six VPP2 heads": Run("six", VPP2 | COUNTED | MTP | GATHER, ({},)),
    "experts PP2 EP2 plain heads": Run("experts", PP2 | EP2 | MTP | PLAIN, (SEQUENCE | EP2,)),
    "two PP4 empty ends": Run("two", {"parallel.pipeline": 4} | COUNTED, ({},)),
    "two PP4 empty ends heads": Run("two", {"parallel.pipeline": 4} | COUNTED | MTP, (TP2,)),
    "experts VPP2 EP2 still": Run("experts", VPP2 | EP2 | STILL),
}
HOPS = [(name, number) for name, run in RUNS.items() for number in range(1, len(run.hops) + 1)]


@pytest.fixture(scope="module")
def root(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See make_models."""
    root = tmp_path_factory.mktemp("layouts")
    make_models(base, root, *MODELS)
    return root


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def state(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole."""
    reader = StateReader(folder / "state")
    return {
        key: reader.read(Slot(key, tuple(stored.size), (0,) * len(stored.size), tuple(stored.size)))
        for key, stored in reader.tensors.items()
    }


def curve(run_dir: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics(run_dir)]


def only(keys: Keys, *names: str) -> Keys:
    return {key: value for key, value in keys.items() if key in names}


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    """The folder of RUNS, and of every MODEL in one process."""
    keys = {**COMMON_KEYS, "train.steps": 3, "data.val_files": f"[{root / 'val.jsonl'}]"}
    forms = {run.form: run for run in RUNS.values()} | {f"{m} whole": Run(m, {}) for m in MODELS}
    whole = [
        config(root / run.model, root / form, **keys, **only(run.keys, *PACKED, *MTP))
        for form, run in forms.items()
    ]
    run_ranks(1, train_all, whole)
    for ranks in {run.ranks for run in RUNS.values()}:
        runs = {name: run for name, run in RUNS.items() if run.ranks == ranks}
        split = [config(root / r.model, root / name, **keys, **r.keys) for name, r in runs.items()]
        run_ranks(ranks, train_all, split)
    return root


def moved_to(root: Path, name: str, number: int) -> Path:
    """The run at the hop of that number; 0 is where it started."""
    return root / (f"{name} {number}" if number else name)


@pytest.fixture(scope="module")
def seen(trained: Path) -> dict[tuple[str, int], set[int]]:
    """The numbers of steps that the parameters had seen where a run had just moved to.

    Each hop starts from the second checkpoint of the one before, saves it again and trains a step.
    """
    configs = {}
    for name, number in HOPS:
        run = RUNS[name]
        stays = (*PLAIN, *BF16, *DROPOUT, *PACKED, *MTP)
        layout = only(run.keys, *stays) | run.hops[number - 1]
        start = step_folder(moved_to(trained, name, number - 1), 2)
        keys = {**COMMON_KEYS, "train.steps": 3, "train.save_at_end": "false"}
        keys |= {"train.save_every": "null", "train.resume": start}
        run_dir = moved_to(trained, name, number)
        configs[name, number] = config(trained / run.model, run_dir, **keys, **layout)
    ranks = run_ranks(RANKS, move, configs)
    return {hop: set().union(*(rank[hop] for rank in ranks)) for hop in configs}


@pytest.mark.parametrize("name", [n for n, run in RUNS.items() if not OTHER_NUMBERS & {*run.keys}])
def test_a_layout_trains_as_one_process(trained: Path, name: str) -> None:
    whole, split = trained / RUNS[name].form, trained / name
    if "packed" in whole.name:
        plain = metrics(trained / f"{RUNS[name].model} whole")
        assert metrics(whole)[0]["kept_tokens"] > 1.5 * plain[0]["kept_tokens"], "nothing packed"
    losses = curve(whole)
    assert losses[0][0] != pytest.approx(losses[-1][0], rel=1e-3), "nothing learned"
    assert curve(split)[0] == pytest.approx(losses[0], rel=1e-5)
    for got, want in zip(curve(split), losses, strict=True):
        assert got == pytest.approx(want, rel=1e-3)
    heads = [key for key in metrics(whole)[0] if "mtp_" in key]
    assert heads == (["mtp_1_loss", "mtp_2_loss"] if "heads" in name else [])
    for key in heads:
        assert metrics(split)[0][key] == pytest.approx(metrics(whole)[0][key], rel=1e-5)
        val = f"val_{key}"
        assert metrics(split)[-1][val] == pytest.approx(metrics(whole)[-1][val], rel=1e-4)
    assert metrics(split)[-1]["val_loss"] == pytest.approx(metrics(whole)[-1]["val_loss"], rel=1e-4)
    # exp_avg after one step is the gradient times 1 - beta: each parameter's, by name
    gradients, wanted = (state(step_folder(run, 1)) for run in (split, whole))
    names = {key for key in wanted if not key.startswith("optimizer.")}
    assert len(names) >= 8
    for key in (f"optimizer.state.exp_avg.{name}" for name in names):
        assert wanted[key].any(), key
        torch.testing.assert_close(gradients[key], wanted[key], rtol=1e-4, atol=1e-7)


def test_the_layout_is_recorded(trained: Path) -> None:
    manifest = read_manifest(step_folder(trained / "experts VPP2 EP2", 1))
    assert manifest["layout"] == {
        "tensor": 1,
        "pipeline": 2,
        "virtual": 2,
        "expert": 2,
        "data": 2,
        "expert_tensor": 1,
    }


def test_heads_change_nothing_in_the_metrics_of_the_loss(trained: Path) -> None:
    plain, heads = (metrics(trained / f"dense whole{form}")[0] for form in ("", " heads"))
    assert {key: heads[key] for key in METRICS} == {key: plain[key] for key in METRICS}
    assert (heads["loss"], heads["kept_tokens"]) == (plain["loss"], plain["kept_tokens"])
    assert heads["grad_norm"] > plain["grad_norm"]
    assert len({heads["mtp_1_loss"], heads["mtp_2_loss"], heads["loss"]}) == 3


@pytest.mark.parametrize(("name", "number"), HOPS)
def test_state_moves_bit_for_bit_and_training_goes_on(
    trained: Path, seen: dict[tuple[str, int], set[int]], name: str, number: int
) -> None:
    assert seen[name, number] == {2}
    start, moved = (step_folder(moved_to(trained, name, n), 2) for n in (0, number))
    before, after = state(start), state(moved)
    parameters = {key for key in before if not key.startswith("optimizer.")}
    masters = ["param"] if "plain" not in name else ["fp32_param"] if "bf16" in name else []
    kinds = ("exp_avg", "exp_avg_sq", *masters)
    states = {f"optimizer.state.{kind}.{key}" for kind in kinds for key in parameters}
    assert before.keys() == parameters | states
    assert_same_tensors(after, before)
    resumed, uninterrupted = (curve(moved_to(trained, name, n))[-1] for n in (number, 0))
    if "dropout" in name:  # at the same layout, which draws on
        assert resumed == uninterrupted
    assert resumed == pytest.approx(uninterrupted, rel=2e-2 if "bf16" in name else 1e-4)


@pytest.mark.parametrize("name", ["experts EP2", "experts TP2 EP2 bf16"])
def test_a_moved_checkpoint_is_exported_bit_for_bit(
    trained: Path, seen: dict[tuple[str, int], set[int]], name: str, tmp_path: Path
) -> None:
    folders = [step_folder(moved_to(trained, name, n), 2) for n in range(len(RUNS[name].hops) + 1)]
    out = [tensors(export_hf(f, tmp_path / f.parents[1].name, verify=False)) for f in folders]
    for other in out[1:]:
        assert_same_tensors(other, out[0])
    original = tensors(trained / "experts" / "hf")
    assert out[0].keys() == original.keys()
    assert not any(torch.equal(out[0][key].float(), original[key]) for key in original)


def test_what_did_not_change_is_exported_as_it_was(trained: Path, tmp_path: Path) -> None:
    out = export_hf(trained / "experts VPP2 EP2 still", tmp_path / "out")
    assert_same_tensors(tensors(out), tensors(trained / "experts" / "hf"))
