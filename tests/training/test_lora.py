"""Adapters alone are trained, as in one process in every layout; their checkpoints move exactly."""

from pathlib import Path

import pytest
import torch

from tests.convert.tiny_models import assert_same_tensors
from tests.distributed import run_ranks
from tests.training.ranks import config, metrics, move, train_all
from tests.training.test_layouts import (
    BF16,
    COMMON_KEYS,
    COUNTED,
    CP2,
    EP2,
    EP4,
    ETP1,
    FUSED,
    GATHER,
    PACKED,
    PLAIN,
    PP2,
    RANKS,
    SEQUENCE,
    TP2,
    VPP2,
    Keys,
    Run,
    curve,
    moved_to,
    root,  # noqa: F401 (a fixture)
    state,
    step_folder,
)

DROPOUT: Keys = {"lora.dropout": 0.2}
FULL: Keys = {"model.recompute": "full"}
LORA: Keys = {**COMMON_KEYS, "lora.rank": 3, "lora.alpha": 5, "optim.lr": 0.02, "train.steps": 3}
RUNS: dict[str, Run] = {
    "dense TP2 PP2": Run("dense", TP2 | PP2 | FULL | FUSED, (SEQUENCE, {})),
    "dense TP2 sequence": Run("dense", SEQUENCE | GATHER),
    "dense VPP2 packed": Run("dense", VPP2 | PACKED),
    "dense PP2 CP2": Run("dense", PP2 | CP2 | PLAIN, (TP2 | PLAIN,)),
    "dense bf16 dropout": Run("dense", SEQUENCE | PP2 | BF16 | DROPOUT, (SEQUENCE | PP2,)),
    "experts TP2 EP2": Run("experts", SEQUENCE | EP2, (PP2 | EP2,)),
    "experts TP2 ETP1 EP4": Run("experts", ETP1 | EP4 | GATHER),
    "experts TP2 ETP1": Run("experts", ETP1),
    # whose first and last stages have nothing to train
    "two PP4 empty ends": Run("two", {"parallel.pipeline": 4} | COUNTED, (TP2 | PP2,)),
}
HOPS = [(name, number) for name, run in RUNS.items() for number in range(1, len(run.hops) + 1)]


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:  # noqa: F811
    """The folder of RUNS, and of every MODEL in one process."""
    keys = {**LORA, "data.val_files": f"[{root / 'val.jsonl'}]"}
    whole = [
        config(root / model, root / f"{model} whole{form}", **keys, **changes)
        for model, form, changes in (
            ("dense", "", {}),
            ("dense", " packed", PACKED),
            ("experts", "", {}),
            ("two", "", {}),
        )
    ]
    split = [config(root / r.model, root / name, **keys, **r.keys) for name, r in RUNS.items()]
    run_ranks(1, train_all, whole)
    run_ranks(RANKS, train_all, split)
    return root


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if not {*BF16} & {*run.keys}])
def test_a_layout_trains_as_one_process(trained: Path, name: str) -> None:
    form = " packed" if name.endswith("packed") else ""
    whole, split = trained / f"{RUNS[name].model} whole{form}", trained / name
    losses = curve(whole)
    assert losses[0][0] != pytest.approx(losses[-1][0], rel=1e-3), "nothing learned"
    assert curve(split)[0] == pytest.approx(losses[0], rel=1e-5)
    for got, want in zip(curve(split), losses, strict=True):
        assert got == pytest.approx(want, rel=1e-3)
    assert metrics(split)[-1]["val_loss"] == pytest.approx(metrics(whole)[-1]["val_loss"], rel=1e-4)
    # exp_avg after two steps holds both gradients: of B, and of A once B is not zero
    gradients, wanted = (state(step_folder(run, 2)) for run in (split, whole))
    names = {key for key in wanted if not key.startswith("optimizer.")}
    assert all(key.endswith((".lora_a", ".lora_b")) for key in names)
    for key in (f"optimizer.state.exp_avg.{name}" for name in names):
        assert wanted[key].any(), key
        torch.testing.assert_close(gradients[key], wanted[key], rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def seen(trained: Path) -> dict[tuple[str, int], set[int]]:
    """As in test_layouts: each hop loads the second checkpoint of the one before, saves it again at
    once, and trains a step."""
    configs = {}
    for name, number in HOPS:
        run = RUNS[name]
        start = step_folder(moved_to(trained, name, number - 1), 2)
        keys = {**LORA, "train.save_at_end": "false", "train.save_every": "null"}
        keys |= {"train.resume": start, **run.hops[number - 1]}
        keys |= {key: value for key, value in run.keys.items() if key in (*PLAIN, *BF16, *DROPOUT)}
        configs[name, number] = config(trained / run.model, moved_to(trained, name, number), **keys)
    ranks = run_ranks(RANKS, move, configs)
    return {hop: set().union(*(rank[hop] for rank in ranks)) for hop in configs}


@pytest.mark.parametrize(("name", "number"), HOPS)
def test_adapters_move_bit_for_bit_and_training_goes_on(
    trained: Path, seen: dict[tuple[str, int], set[int]], name: str, number: int
) -> None:
    assert seen[name, number] == {2}
    start, moved = (step_folder(moved_to(trained, name, n), 2) for n in (0, number))
    before, after = state(start), state(moved)
    parameters = {key for key in before if not key.startswith("optimizer.")}
    assert all(key.endswith((".lora_a", ".lora_b")) for key in parameters)
    kinds = ("exp_avg", "exp_avg_sq", *([] if {*PLAIN} & {*RUNS[name].keys} else ["param"]))
    assert before.keys() == parameters | {
        f"optimizer.state.{kind}.{key}" for kind in kinds for key in parameters
    }
    assert_same_tensors(after, before)
    resumed, uninterrupted = (curve(moved_to(trained, name, n))[-1] for n in (number, 0))
    if "dropout" in name:  # at the same layout, which draws on
        assert resumed == uninterrupted
    assert resumed == pytest.approx(uninterrupted, rel=1e-4)
