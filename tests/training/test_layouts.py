"""Runs with experts and virtual pipelines: one process's numbers, and state that moves exactly."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from megatron_deft.checkpoint_folder import read_manifest
from megatron_deft.convert.hf import export_hf, import_hf
from megatron_deft.convert.mapping import Slot
from megatron_deft.convert.state import StateReader
from tests.convert.tiny_models import COMMON, assert_same_tensors, make, tensors
from tests.distributed import run_ranks
from tests.training.ranks import config, metrics, move, train_all

SHAPE: dict[str, Any] = {**COMMON, "vocab_size": 301, "num_key_value_heads": 2}
MODELS: dict[str, PretrainedConfig] = {
    "dense": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    # no experts on the second of two pipeline stages
    "experts": Qwen3MoeConfig(
        **SHAPE,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[2, 3],
    ),
}
RANKS = 4
TP2: dict[str, Any] = {"parallel.tensor": 2}
SEQUENCE: dict[str, Any] = {**TP2, "parallel.sequence": "true"}
PP2: dict[str, Any] = {"parallel.pipeline": 2}
VPP2: dict[str, Any] = {**PP2, "parallel.virtual_pipeline": 2}
EP2: dict[str, Any] = {"parallel.expert": 2}
PLAIN: dict[str, Any] = {"parallel.distributed_optimizer": "false"}
OVERLAP: dict[str, Any] = {"parallel.overlap_grad_reduce": "true"}
BF16: dict[str, Any] = {"model.dtype": "bf16"}

# Trained from the start. 16 samples of micro-batches of 2: four per rank of two, two of four.
TRAINED: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {"VPP2": VPP2, "VPP2 overlapped": VPP2 | OVERLAP, "VPP2 plain": VPP2 | PLAIN},
    "experts": {
        "EP2": EP2,
        "EP4 plain": {"parallel.expert": 4} | PLAIN,
        "PP2 EP2": PP2 | EP2,
        "VPP2 EP2": VPP2 | EP2 | OVERLAP,
        "TP2 EP2": SEQUENCE | EP2,
    },
}
# Each chain is trained at its first layout, then goes from each to the next.
Chain = tuple[str, dict[str, Any], list[dict[str, Any]]]
CHAINS: dict[str, Chain] = {
    "dense": ("dense", {}, [VPP2, TP2, VPP2, {}]),
    "dense, plain bf16": ("dense", PLAIN | BF16, [VPP2, TP2, VPP2]),
    "experts": (
        "experts",
        {},
        [EP2, {}, SEQUENCE | EP2, PP2, VPP2 | EP2, SEQUENCE, {"parallel.expert": 4}],
    ),
    "experts, bf16": ("experts", BF16, [SEQUENCE | EP2, PP2 | EP2, EP2]),
    "experts, plain bf16": ("experts", PLAIN | BF16, [EP2, PP2 | EP2, {}]),
    "experts, plain": ("experts", PLAIN, [PP2, EP2]),
}
COMMON_KEYS: dict[str, Any] = {
    "train.global_batch": 16,
    "train.save_every": 1,
    "optim.warmup_ratio": 0,
}


@pytest.fixture(scope="module")
def root(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, and MODEL/hf and MODEL/megatron of every model."""
    root = tmp_path_factory.mktemp("layouts")
    shutil.copy(base / "train.jsonl", root)
    for name, model in MODELS.items():
        hf = make(root / name / "hf", model)
        for file in (base / "hf").iterdir():
            if not (hf / file.name).exists() and file.suffix != ".safetensors":
                shutil.copy(file, hf)
        shutil.copy(root / "train.jsonl", root / name)
        import_hf(hf, root / name / "megatron", verify=False)
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


# (a) training


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    """The runs of TRAINED, MODEL/NAME, and MODEL/whole in one process: three steps each."""
    keys = {**COMMON_KEYS, "train.steps": 3, "data.val_files": f"[{root / 'train.jsonl'}]"}
    whole = [config(root / name, root / name / "whole", **keys) for name in MODELS]
    split = [
        config(root / name, root / name / layout, **keys, **parallel)
        for name, layouts in TRAINED.items()
        for layout, parallel in layouts.items()
    ]
    run_ranks(1, train_all, whole)
    run_ranks(RANKS, train_all, split)
    return root


@pytest.mark.parametrize(
    ("model", "layout"), [(name, layout) for name, layouts in TRAINED.items() for layout in layouts]
)
def test_a_layout_trains_as_one_process(trained: Path, model: str, layout: str) -> None:
    whole, split = trained / model / "whole", trained / model / layout
    losses = curve(whole)
    assert losses[0][0] != pytest.approx(losses[-1][0], rel=1e-3), "nothing learned"
    assert curve(split)[0] == pytest.approx(losses[0], rel=1e-5)
    for got, want in zip(curve(split), losses, strict=True):
        assert got == pytest.approx(want, rel=1e-3)
    assert metrics(split)[-1]["val_loss"] == pytest.approx(metrics(whole)[-1]["val_loss"], rel=1e-4)
    # exp_avg after one step is the gradient times 1 - beta: each parameter's, by name
    got, want = (state(step_folder(run, 1)) for run in (split, whole))
    gradients = {key for key in want if key.startswith("optimizer.state.exp_avg.")}
    assert len(gradients) == len([key for key in want if not key.startswith("optimizer.")])
    for key in gradients:
        assert want[key].any(), key
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-7)


def test_the_layout_is_recorded(trained: Path) -> None:
    manifest = read_manifest(step_folder(trained / "experts" / "VPP2 EP2", 1))
    assert manifest["layout"] == {"tensor": 1, "pipeline": 2, "virtual": 2, "expert": 2, "data": 2}


# (b) optimizer state from layout to layout


@pytest.fixture(scope="module")
def moved(root: Path) -> tuple[Path, dict[str, set[int]]]:
    """CHAIN/0 is trained for four steps; CHAIN/1 goes on from step 2 of it, and so forth.

    returns: the folder, and the numbers of steps that the parameters of CHAIN/NUMBER had seen
    """
    keys = {**COMMON_KEYS, "train.steps": 4, "train.save_every": 2}
    first, then = [], {}
    for name, (model, common, layouts) in CHAINS.items():
        for number, layout in enumerate(layouts):
            run_dir, before = root / name / f"{number}", root / name / f"{number - 1}"
            resume = {"train.resume": step_folder(before, 2)} if number else {}
            cfg = config(root / model, run_dir, **keys, **common, **layout, **resume)
            if number:
                then[f"{name} {number}"] = cfg
            else:
                first.append(cfg)
    run_ranks(RANKS, train_all, first)
    seen = run_ranks(RANKS, move, then)
    return root, {name: set().union(*(rank[name] for rank in seen)) for name in then}


HOPS = [(name, n) for name, (_, _, layouts) in CHAINS.items() for n in range(1, len(layouts))]


@pytest.mark.parametrize(("chain", "hop"), HOPS)
def test_state_moves_bit_for_bit_and_training_goes_on(
    moved: tuple[Path, dict[str, set[int]]], chain: str, hop: int
) -> None:
    root, seen = moved
    assert seen[f"{chain} {hop}"] == {2}
    before, after = (state(step_folder(root / chain / f"{n}", 2)) for n in (0, hop))
    parameters = {key for key in before if not key.startswith("optimizer.")}
    masters = ["param"] if "plain" not in chain else ["fp32_param"] if "bf16" in chain else []
    for kind in ("exp_avg", "exp_avg_sq", *masters):
        assert {f"optimizer.state.{kind}.{key}" for key in parameters} <= before.keys(), kind
    assert_same_tensors(after, before)
    uninterrupted, resumed = curve(root / chain / "0")[2:], curve(root / chain / f"{hop}")
    assert len(resumed) == 2
    for got, want in zip(resumed, uninterrupted, strict=True):
        assert got == pytest.approx(want, rel=2e-2 if "bf16" in chain else 1e-4)


@pytest.mark.parametrize("chain", ["experts", "experts, bf16"])
def test_a_moved_checkpoint_is_exported_bit_for_bit(
    moved: tuple[Path, dict[str, set[int]]], chain: str, tmp_path: Path
) -> None:
    root, _ = moved
    folders = [step_folder(root / chain / f"{n}", 2) for n in range(len(CHAINS[chain][2]))]
    out = [tensors(export_hf(f, tmp_path / f.parents[1].name, verify=False)) for f in folders]
    for other in out[1:]:
        assert_same_tensors(other, out[0])
    original = tensors(root / "experts" / "hf")
    assert out[0].keys() == original.keys()
    assert not any(torch.equal(out[0][key].float(), original[key]) for key in original)


def test_what_did_not_move_is_exported_as_it_was(root: Path, tmp_path: Path) -> None:
    """A learning rate too small to change a bit: the export is the model it started from."""
    keys = {**COMMON_KEYS, "train.steps": 1, "optim.lr": 1e-30}
    run_dir = root / "experts" / "still"
    run_ranks(RANKS, train_all, [config(root / "experts", run_dir, **keys, **VPP2, **EP2)])
    out = export_hf(run_dir, tmp_path / "out")
    assert_same_tensors(tensors(out), tensors(root / "experts" / "hf"))
