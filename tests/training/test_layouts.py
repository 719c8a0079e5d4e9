"""Runs with experts and virtual pipelines: one process's numbers, and state that moves exactly."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

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
    # stages of several lengths
    "five": LlamaConfig(**SHAPE | {"num_hidden_layers": 5}, tie_word_embeddings=True),
    "six": LlamaConfig(**SHAPE | {"num_hidden_layers": 6}, tie_word_embeddings=False),
}
RANKS = 4
Keys = dict[str, Any]
TP2: Keys = {"parallel.tensor": 2}
SEQUENCE: Keys = {**TP2, "parallel.sequence": "true"}
PP2: Keys = {"parallel.pipeline": 2}
PP3: Keys = {"parallel.pipeline": 3}
VPP2: Keys = {**PP2, "parallel.virtual_pipeline": 2}
EP2: Keys = {"parallel.expert": 2}
EP4: Keys = {"parallel.expert": 4}
PLAIN: Keys = {"parallel.distributed_optimizer": "false"}
OVERLAP: Keys = {"parallel.overlap_grad_reduce": "true"}
BF16: Keys = {"model.dtype": "bf16"}
DROPOUT: Keys = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}
STILL: Keys = {"optim.lr": 1e-30}  # too small to change a bit of a weight
PACKED: Keys = {"data.pack": "true", "data.max_length": 128}
FUSED: Keys = {"loss.fused_linear": "true", "loss.chunk_tokens": 3}
CP2: Keys = {"parallel.context": 2}
GATHER: Keys = {**OVERLAP, "parallel.overlap_param_gather": "true"}
ETP1: Keys = {**SEQUENCE, "parallel.expert_tensor": 1}
EMBEDDING: Keys = {"parallel.account_for_embedding": "true"}
LOSS: Keys = {"parallel.account_for_loss": "true"}
COUNTED = EMBEDDING | LOSS
FIRST = "parallel.first_stage_layers"
LAST = "parallel.last_stage_layers"
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
        return f"{self.model} whole packed" if "data.pack" in self.keys else f"{self.model} whole"


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
    "experts PP2 EP2 gather": Run("experts", PP2 | EP2 | GATHER),
    "experts TP2 ETP1 EP4": Run("experts", ETP1 | EP4, (ETP1 | EP4, {})),
    "experts TP2 ETP1 EP2": Run("experts", ETP1 | EP2),
    "experts VPP2 EP2 still": Run("experts", VPP2 | EP2 | STILL),
}
HOPS = [(name, number) for name, run in RUNS.items() for number in range(1, len(run.hops) + 1)]


@pytest.fixture(scope="module")
def root(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with val.jsonl, and of every model MODEL/train.jsonl, MODEL/hf, MODEL/megatron."""
    root = tmp_path_factory.mktemp("layouts")
    shutil.copy(base / "val.jsonl", root)
    for name, model in MODELS.items():
        hf = make(root / name / "hf", model)
        for file in (base / "hf").iterdir():
            if not (hf / file.name).exists() and file.suffix != ".safetensors":
                shutil.copy(file, hf)
        shutil.copy(base / "train.jsonl", root / name)
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


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    """The folder of RUNS, and of every MODEL in one process."""
    keys = {**COMMON_KEYS, "train.steps": 3, "data.val_files": f"[{root / 'val.jsonl'}]"}
    forms = {run.form: run for run in RUNS.values()} | {f"{m} whole": Run(m, {}) for m in MODELS}
    whole = [
        config(root / run.model, root / form, **keys, **(PACKED if "packed" in form else {}))
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
        stays = (*PLAIN, *BF16, *DROPOUT, *PACKED)
        layout = {key: value for key, value in run.keys.items() if key in stays}
        layout |= run.hops[number - 1]
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
