"""Whole runs on real gloo ranks: layouts agree, resume is exact, numbers mean what they say."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_deft import checkpoint_folder, platform
from megatron_deft.config import RunConfig
from megatron_deft.convert.hf import export_hf
from megatron_deft.convert.inspect import inspect
from megatron_deft.data.batches import collate
from megatron_deft.data.tokenizer import write_template
from megatron_deft.errors import UserError
from megatron_deft.hashing import hash_files
from megatron_deft.revision import revision
from megatron_deft.training.run import run
from tests.data.conftest import CHATML
from tests.distributed import run_ranks
from tests.training.ranks import (
    STEPS,
    config,
    metrics,
    same_but_time,
    train_all,
    train_and_hear,
)

# Every family; of cayley the form whose mean does not depend on the data-parallel size.
LAYOUT_FREE = [
    "nll",
    "p",
    "tsallis(q=0.5)",
    "onlytopp(t=0.0037)",
    "onlybottomp(t=0.01)",
    "onlytoplogp(t=0.0037)",
    "onlybottomlogp(t=0.01)",
    "dft",
    "eaft",
    "eaft(entropy=exact)",
    "cayley",
    "deft",
]
Trajectory = list[tuple[float, float]]  # loss and gradient norm of each step


def losses_of(base: Path, folder: Path, world: int, **layout: Any) -> dict[str, Trajectory]:
    configs = [config(base, folder / spec, objective=spec, **layout) for spec in LAYOUT_FREE]
    run_ranks(world, train_all, configs)
    return {
        spec: [(line["loss"], line["grad_norm"]) for line in metrics(folder / spec)]
        for spec in LAYOUT_FREE
    }


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trajectory]:
    """The losses of every objective in one process."""
    return losses_of(base, tmp_path_factory.mktemp("tp1"), 1)


LAYOUTS = {
    "TP2": (2, {"parallel.tensor": 2}),
    "PP2": (2, {"parallel.pipeline": 2}),
    "DP2": (2, {}),
    "TP2xPP2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_losses_of_one_process(
    base: Path, tmp_path: Path, whole: dict[str, Trajectory], name: str
) -> None:
    world, layout = LAYOUTS[name]
    got = losses_of(base, tmp_path, world, **layout)
    for spec in LAYOUT_FREE:
        assert len(got[spec]) == STEPS
        assert whole[spec][0][0] != pytest.approx(whole[spec][-1][0], rel=1e-3), "nothing learned"
        # The first step has the very same weights; then fp32 rounding is amplified by Adam.
        assert got[spec][0] == pytest.approx(whole[spec][0], rel=1e-5), spec
        for step in range(STEPS):
            assert got[spec][step] == pytest.approx(whole[spec][step], rel=1e-3), (spec, step)
            assert got[spec][step][0] == pytest.approx(whole[spec][step][0], rel=2e-4), (spec, step)


def test_objectives_are_different_runs(whole: dict[str, Trajectory]) -> None:
    """No objective is quietly another: each has a trajectory of its own."""
    trajectories = {tuple(round(loss, 6) for loss, _ in steps) for steps in whole.values()}
    assert len(trajectories) == len(LAYOUT_FREE)


RESUMED = {
    "TP2xPP2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
    "DP2 bf16 with dropout": (2, {"model.dtype": "bf16", "model.hidden_dropout": 0.1}),
    # dropout inside tensor-parallel regions draws from megatron-core's own generators
    "TP2 sequence": (
        2,
        {"parallel.tensor": 2, "parallel.sequence": "true", "model.attention_dropout": 0.1},
    ),
    "one process, no distributed optimizer": (1, {"parallel.distributed_optimizer": "false"}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_equals_uninterrupted_to_the_last_digit(
    base: Path, tmp_path: Path, name: str
) -> None:
    world, layout = RESUMED[name]
    common = {**layout, "train.steps": 6, "train.save_every": 3, "train.keep_checkpoints": 2}
    run_dir = tmp_path / "run"
    run_ranks(world, train_all, [config(base, run_dir, **common)])
    uninterrupted = metrics(run_dir)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [
        "latest",
        "step_00000003",
        "step_00000006",
    ]
    # lose the newest checkpoint: what is gone on from is step 3
    (run_dir / "checkpoints" / "step_00000006" / "megatron_deft.json").unlink()
    run_ranks(world, train_all, [config(base, run_dir, **common, **{"train.resume": "must"})])
    resumed = metrics(run_dir)
    assert [line["step"] for line in resumed] == list(range(1, 7))
    assert same_but_time(resumed) == same_but_time(uninterrupted)
    manifest = checkpoint_folder.read_manifest(run_dir / "checkpoints" / "step_00000006")
    assert manifest["tokens"] == sum(line["tokens"] for line in resumed)
    assert manifest["revision"] == revision()


def test_resume_at_another_layout(base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    common = {"train.steps": 6, "train.save_every": 3}
    two = {"parallel.tensor": 2, "parallel.pipeline": 2}
    run_ranks(4, train_all, [config(base, run_dir, **common, **two)])
    uninterrupted = [line["loss"] for line in metrics(run_dir)]
    start = run_dir / "checkpoints" / "step_00000003"
    other = tmp_path / "other"
    run_ranks(2, train_all, [config(base, other, **common, **{"train.resume": start})])
    resumed = [line["loss"] for line in metrics(other)]
    assert resumed == pytest.approx(uninterrupted[3:], rel=1e-5)


def as_before_experts(folder: Path) -> None:
    """Make a checkpoint of what it was before layouts had experts and virtual pipelines.

    Its layout did not name them, and it held megatron-core's parameter groups.
    """
    common = torch.load(folder / "state" / "common.pt", weights_only=False)
    groups = [{"lr": 0.1, "wd_mult": mult, "step": 99.0} for mult in (0.0, 1.0)]
    common["optimizer"] = {"optimizer": {"param_groups": groups}, "param_state": {}}
    torch.save(common, folder / "state" / "common.pt")
    manifest = checkpoint_folder.read_manifest(folder)
    del manifest["layout"]["expert"], manifest["layout"]["virtual"]
    manifest["files"] |= hash_files(folder, ["state/common.pt"])
    (folder / checkpoint_folder.MANIFEST).write_text(json.dumps(manifest))


def test_resume_of_an_older_checkpoint(base: Path, tmp_path: Path) -> None:
    common = {"train.steps": 4, "train.save_every": 2, "model.hidden_dropout": 0.1}
    run_ranks(1, train_all, [config(base, tmp_path / "run", **common)])
    start = tmp_path / "run" / "checkpoints" / "step_00000002"
    as_before_experts(start)
    cfg = config(base, tmp_path / "on", **common, **{"train.resume": start})
    assert "another layout" not in run_ranks(1, train_and_hear, cfg)[0]
    uninterrupted = same_but_time(metrics(tmp_path / "run"))
    assert same_but_time(metrics(tmp_path / "on")) == uninterrupted[2:]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def refused(rank: int, world: int, cfg: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        run(cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused_then_train(rank: int, world: int, cfgs: list[RunConfig], stray: Path) -> list[str]:
    """What is said of the runs; they then go on without the stray file."""
    said = [refused(rank, world, cfg) for cfg in cfgs]
    stray.unlink(missing_ok=True)
    run(cfgs[0])
    for _ in range(2):  # the first time leaves metrics and no checkpoint, as one that died does
        run(cfgs[1])
    return said


def test_runs_that_would_overwrite_or_cannot_resume_are_refused(base: Path, tmp_path: Path) -> None:
    run_dir, hf = tmp_path / "run", tmp_path / "hf"
    shutil.copytree(base / "hf", hf)
    write_template(hf, CHATML)
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    model = {"model.load": "null", "model.hf": hf}
    cfg = config(base, run_dir, **model, **{"train.steps": 1, "train.save_at_end": "true"})
    run_ranks(1, train_all, [cfg])
    assert "pass --resume" in run_ranks(1, refused, cfg)[0]
    checkpoint = run_dir / "checkpoints" / "step_00000001"
    assert (checkpoint / "hf" / "additional_chat_templates" / "tools.jinja").is_file()
    stray = checkpoint / "hf" / "added_tokens.json"
    stray.write_text("{}")
    (problem,) = inspect(checkpoint).problems
    assert problem.startswith(f"{stray} was put there after the folder was written")
    with pytest.raises(UserError, match=re.escape(problem)):
        export_hf(checkpoint, tmp_path / "out")
    for name in ("hf/.nfs0001", "hf/.DS_Store", "state/.nfs0002"):
        (checkpoint / name).touch()
    more = config(base, run_dir, **model, **{"train.steps": 2, "train.resume": "auto"})
    named = config(
        base, tmp_path / "by name", **model, **{"train.steps": 2, "train.resume": checkpoint}
    )
    for said in run_ranks(2, refused_then_train, [more, named], stray):
        assert all(f"{stray} was put there after the folder was written" in line for line in said)
    assert [line["step"] for line in metrics(run_dir)] == [1, 2]
    assert [line["step"] for line in metrics(tmp_path / "by name")] == [2]
    none = config(base, tmp_path / "none", **{"train.resume": "must"})
    assert "holds no whole checkpoint" in run_ranks(2, refused, none)[1]
    bare = config(base, tmp_path / "bare", **{"train.steps": 1})
    run_ranks(1, train_all, [bare])
    assert "metrics of another run" in run_ranks(1, refused, bare)[0]
    weights = config(base, tmp_path / "none", **{"train.resume": base / "megatron"})
    assert "model.load" in run_ranks(1, refused, weights)[0]


def by_hand(base: Path, rows: int, reduction: str) -> tuple[float, float]:
    """Loss and gradient norm of NLL on the first rows: transformers and the written formula."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_deft.data.chat import encode, render_columns

    model = AutoModelForCausalLM.from_pretrained(base / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base / "hf")
    lines = (base / "train.jsonl").read_text().splitlines()[:rows]
    texts = [json.loads(line)["extra_info"] for line in lines]
    samples = encode(
        tokenizer, [render_columns(tokenizer, t["question"], t["answer"]) for t in texts]
    )
    batch = collate([[s] for s in samples], max(len(s.tokens) for s in samples), packed=False)
    logp = model(batch["tokens"]).logits.double().log_softmax(-1)
    labels = batch["labels"]
    nll = -logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
    kept = (labels >= 0).sum(-1)
    assert len(set(kept.tolist())) > 1, "samples must differ in length"
    per_sample, pairs = nll.sum(-1), (rows // 2, 2)
    loss = {
        "token": per_sample.sum() / kept.sum(),
        "micro_batch": (per_sample.reshape(pairs).sum(1) / kept.reshape(pairs).sum(1)).mean(),
        "sample": (per_sample / kept).mean(),
    }[reduction]
    loss.backward()
    norm = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()
    return loss.item(), norm.item()


@pytest.mark.parametrize("world", [1, 2])
def test_reductions(base: Path, tmp_path: Path, world: int) -> None:
    """Loss and gradient of each reduction, over micro-batches and ranks, against autograd."""
    one = {"train.steps": 1, "train.micro_batch": 2, "objective": "nll", "data.shuffle": "false"}
    names = ("token", "micro_batch", "sample")
    runs = [config(base, tmp_path / name, reduction=name, **one) for name in names]
    run_ranks(world, train_all, runs)
    wanted = {name: by_hand(base, 8, name) for name in names}
    for name in names:
        line = metrics(tmp_path / name)[0]
        assert (line["loss"], line["grad_norm"]) == pytest.approx(wanted[name], rel=1e-5), name
    assert len({round(loss, 4) for loss, _ in wanted.values()}) == 3


def decay_alone(rank: int, world: int, cfg: RunConfig) -> dict[str, float]:
    """How much each kind of parameter shrinks in a step whose gradients are 0."""
    from megatron_deft.training.base import read_base
    from megatron_deft.training.trainer import Trainer

    os.environ["WORLD_SIZE"] = "1"
    base = read_base(cfg.model)
    platform.initialize()
    trainer = Trainer(cfg, base)
    named = dict(trainer.model[0].named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    trainer.step()
    ratios = {name: (p / before[name]).mean().item() for name, p in named.items()}
    return {
        "matrix": ratios["decoder.layers.0.mlp.linear_fc1.weight"],
        "norm": ratios["decoder.final_layernorm.weight"],
    }


def test_weight_decay_is_on_matrices_alone(base: Path, tmp_path: Path) -> None:
    """An objective that keeps no token leaves the decay alone: 1 - lr * weight_decay = 0.95."""
    idle = {"objective": "onlytopp(t=0.99)", "optim.lr": 0.1, "optim.weight_decay": 0.5}
    cfg = config(base, tmp_path / "run", **idle, **{"optim.warmup_ratio": 0})
    got = run_ranks(1, decay_alone, cfg)[0]
    assert got == pytest.approx({"matrix": 0.95, "norm": 1.0}, rel=1e-5)


@pytest.mark.parametrize("reduction", ["token", "micro_batch", "sample"])
def test_validation_counts_every_sample_once(base: Path, tmp_path: Path, reduction: str) -> None:
    """12 samples in global batches of 2, 8 (8 + 4) and 64: filler must not count."""
    still = {
        "objective": "nll",
        "reduction": reduction,
        "optim.lr": 1e-30,
        "train.steps": 1,
        "data.val_files": f"[{base / 'train.jsonl'}]",
        "data.val_max_samples": 12,
    }
    sizes = (2, 8, 64)
    runs = [config(base, tmp_path / str(n), **still, **{"train.global_batch": n}) for n in sizes]
    run_ranks(1, train_all, runs)
    want, _ = by_hand(base, 12, reduction)
    for n in sizes:
        assert metrics(tmp_path / str(n))[0]["val_loss"] == pytest.approx(want, rel=1e-5), n


def test_a_base_that_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    """Another architecture on resume, and weights with a flipped byte."""
    run_dir, other, flipped = tmp_path / "run", tmp_path / "other", tmp_path / "flipped"
    run_ranks(1, train_all, [config(base, run_dir, **{"train.steps": 1, "train.save_every": 1})])
    for copy in (other, flipped):
        shutil.copytree(base / "megatron", copy)
    flip_a_byte(next((flipped / "state").glob("*.distcp")))
    manifest = checkpoint_folder.read_manifest(other)
    manifest["spec"]["tied_embeddings"] = True
    (other / "megatron_deft.json").write_text(json.dumps(manifest))
    resumed = config(base, run_dir, **{"train.resume": "must", "model.load": other})
    assert "another architecture" in run_ranks(1, refused, resumed)[0]
    damaged = config(base, tmp_path / "new", **{"model.load": flipped})
    for message in run_ranks(2, refused, damaged):
        assert "does not match its checksum" in message


def test_an_objective_that_keeps_nothing_says_so(base: Path, tmp_path: Path) -> None:
    cfg = config(base, tmp_path / "run", objective="onlytopp(t=0.99)", **{"train.steps": 2})
    said = run_ranks(1, train_and_hear, cfg)[0]
    assert said.count("keeps no token at all") == 1
    line = metrics(tmp_path / "run")[0]
    assert line["kept_tokens"] == 0
    assert line["ce"] is None
    assert {"loss", "ce"} <= set(line["nonfinite"])


def test_what_changed_since_the_checkpoint_is_used_and_named(base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_ranks(1, train_all, [config(base, run_dir, **{"train.steps": 2, "train.save_every": 1})])
    low = "".join(json.dumps({"step": 2, "loss": 0.5 + n / 1e4}) + "\n" for n in range(20))
    (run_dir / "metrics.jsonl").write_text(low)
    changed = {"seed": 5, "optim.weight_decay": 0.5, "train.steps": 3, "train.resume": "must"}
    said = run_ranks(1, train_and_hear, config(base, run_dir, **changed))[0]
    assert "seed is 5 now and was 1234; samples come in another order" in said
    assert "optim.weight_decay is 0.5 now and was 0.01" in said
    height = metrics(run_dir)[-1]["loss_spike"]
    assert f"is {height:.1f} standard deviations above the median" in said
    other = config(base, run_dir, **changed, **{"parallel.distributed_optimizer": "false"})
    assert "was saved with True" in run_ranks(1, refused, other)[0]


def test_metrics_of_a_step(base: Path, tmp_path: Path) -> None:
    cfg = config(
        base,
        tmp_path / "run",
        objective="dft",
        **{"train.steps": 2, "data.val_files": f"[{base / 'val.jsonl'}]"},
    )
    run_ranks(2, train_all, [cfg])
    lines = metrics(tmp_path / "run")
    first = lines[0]
    assert first["gate"] == pytest.approx(first["p"])  # dft's gate is p
    histogram = [first[f"gate_histogram_{i}"] for i in range(10)]
    assert sum(histogram) == pytest.approx(1)
    assert 0 < first["collision"] < 1
    assert 0 < first["entropy"] <= torch.tensor(301.0).log().item()
    assert first["loss"] < first["ce"]  # dft looks far smaller than cross-entropy
    assert first["kept_tokens"] > 0
    assert "val_loss" not in first
    assert lines[1]["val_ce"] > 0  # after the last step, over all 13 samples
    assert lines[1]["samples"] == 16


def test_a_run_that_blows_up_stops_and_saves_nothing(base: Path, tmp_path: Path) -> None:
    wild = {"optim.lr": 1e30, "optim.warmup_ratio": 0, "optim.clip_grad": 0}
    cfg = config(base, tmp_path / "run", **wild, **{"train.save_every": 3})
    message = run_ranks(1, refused, cfg)[0]
    assert "no checkpoint was saved since" in message
    assert not (tmp_path / "run" / "checkpoints").exists()
