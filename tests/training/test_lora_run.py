"""A run with adapters: what it costs, what it says, and what can be done with what it leaves."""

from pathlib import Path
from typing import Any

import pytest

from megatron_deft.convert.adapters import numbers
from megatron_deft.convert.hf import export_hf
from megatron_deft.convert.hf_folder import read_json
from megatron_deft.models.adapters import TARGETS, Adapters
from megatron_deft.models.families import spec_from_hf
from tests.convert.tiny_models import assert_same_tensors, tensors
from tests.distributed import run_ranks
from tests.training.lora_ranks import Seen, hear, look
from tests.training.ranks import config, metrics
from tests.training.test_layouts import state

HEAD = (304, 32)  # the output layer and the embedding, padded
RANK = {"lora.rank": 2}
TWO_STEPS = {"objective": "nll", "train.steps": 2, "optim.warmup_ratio": 0}


@pytest.fixture(scope="module")
def seen(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    root = tmp_path_factory.mktemp("look")
    keys = {**TWO_STEPS, "data.val_files": f"[{base / 'val.jsonl'}]", "optim.lr": 0.1}
    plain = {"loss.fused_linear": "false"}
    fused = {"loss.fused_linear": "true"}
    changes: dict[str, dict[str, Any]] = {
        "whole": plain,
        "whole fused": fused,
        "adapters": RANK | plain,
        "adapters fused": RANK | fused,
        "TP2 PP2": RANK | {"parallel.tensor": 2, "parallel.pipeline": 2, "lora.dropout": 0.3},
    }
    configs = {name: config(base, root / name, **keys, **own) for name, own in changes.items()}
    *one, last = configs.values()
    found = [*run_ranks(1, look, one)[0], run_ranks(4, look, [last])[0][0]]
    firsts = [state_of(cfg.run_dir) for cfg in configs.values() if cfg.lora.rank]
    for other in firsts[1:]:
        assert_same_tensors(other, firsts[0])
    return dict(zip(configs, found, strict=True))


def state_of(run_dir: str) -> dict[str, Any]:
    """What is trained, before the first step."""
    (Path(run_dir) / "state").symlink_to(Path(run_dir) / "first")
    return state(Path(run_dir))


def test_the_first_forward_is_the_base_s_to_the_last_bit(seen: dict[str, Seen]) -> None:
    for form in ("", " fused"):
        assert seen[f"adapters{form}"].val_loss == seen[f"whole{form}"].val_loss


def test_adapters_alone_have_gradients_and_state(base: Path, seen: dict[str, Seen]) -> None:
    spec = spec_from_hf(read_json(base / "hf" / "config.json", "config"))
    trained, whole = numbers(spec, Adapters(2, 4.0, False, 0.0, TARGETS))
    for name, number in (("adapters", trained), ("whole", whole + 3 * 2 * 32)):  # and padding
        found = seen[name]
        assert found.trained == number
        # fp32 gradients and two moments; buffers are padded to whole cache lines
        assert 4 * number <= found.gradient_bytes < 4 * number + 4096
        assert 8 * number <= found.state_bytes < 8 * number + 8192
    assert not seen["adapters"].frozen_changed


def test_what_tensor_ranks_share_stays_alike(seen: dict[str, Seen]) -> None:
    """With dropout: the inputs of a column-parallel layer are dropped alike."""
    assert not seen["TP2 PP2"].replicas_differ


def test_no_gradient_of_a_frozen_head_or_embedding_is_made(seen: dict[str, Seen]) -> None:
    for form in ("", " fused"):
        assert HEAD in seen[f"whole{form}"].made
        assert HEAD not in seen[f"adapters{form}"].made


@pytest.fixture(scope="module")
def said(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    root = tmp_path_factory.mktemp("said")
    hf = {"model.hf": base / "hf", "model.load": "null"}
    keys: dict[str, Any] = {"optim.lr": 0.05, "data.val_files": f"[{base / 'val.jsonl'}]"}
    keys |= {"train.steps": 2, "train.save_at_end": "true", "objective": "nll"}
    again = {**keys, **hf, "train.steps": 3, "train.resume": "must"}
    merged = {"model.hf": root / "run" / "hf" / "step_00000002", "model.load": "null"}
    runs: dict[str, tuple[str, dict[str, Any]]] = {
        "adapters": ("run", {**keys, **hf, **RANK, "checkpoint.export_hf": "last"}),
        "other base": ("run", {**again, **RANK, "model.hf": "null",
                               "model.load": base / "megatron"}),
        "other rank": ("run", {**again, "lora.rank": 4}),
        "other targets": ("run", {**again, **RANK, "lora.targets": "[linear_qkv]"}),
        "no adapters": ("run", again),
        "as base": ("new", {**keys, **RANK, "model.load": root / "run"}),
        "merged": ("merged", {**keys, **merged, "optim.lr": 1e-30}),
        "whole resumed": ("merged", {**again, **merged, **RANK}),
        "other alpha": ("run", {**again, **RANK, "lora.alpha": 9}),
    }  # fmt: skip
    configs = [config(base, root / run_dir, **own) for run_dir, own in runs.values()]
    return root, dict(zip(runs, run_ranks(1, hear, configs)[0], strict=True))


def test_the_log_tells_what_is_trained(said: tuple[Path, dict[str, str]]) -> None:
    _, found = said
    assert "\ntrains 2.4k of 50.1k parameters (4.85%): adapters of rank 2\n" in found["adapters"]
    assert "\ntrains 50.1k of 50.1k parameters\n" in found["merged"]


def test_what_cannot_be_gone_on_from_is_named(said: tuple[Path, dict[str, str]]) -> None:
    root, found = said
    went = ("adapters", "merged", "other alpha")
    assert not any("\n" in text for name, text in found.items() if name not in went)
    folder = root / "run" / "checkpoints" / "step_00000002"
    assert f"has other weights than the base of {folder}, which was" in found["other base"]
    assert f"lora.rank=4, but {folder} was saved with 2: set it so" in found["other rank"]
    assert "lora.targets=linear_qkv, but " in found["other targets"]
    assert f"lora.rank=null, but {folder} holds adapters: set lora.rank=2" in found["no adapters"]
    remedy = f"go on training them with train.resume={folder}, or merge them"
    assert f"holds adapters, no whole model: {remedy}" in found["as base"]
    assert "lora.rank=2, but " in found["whole resumed"]
    assert "was trained without adapters: set it to null, or" in found["whole resumed"]
    assert "warning: lora.alpha is 9.0 now and was 4.0\n" in found["other alpha"]
    assert "step 3/3 " in found["other alpha"]


def test_training_goes_on_from_the_export_that_the_run_left(
    said: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root, found = said
    assert f"exported {root / 'run' / 'hf' / 'step_00000002'}\n" in found["adapters"]
    assert "step 2/2 " in found["merged"]
    with_adapters, merged = (metrics(root / run)[1] for run in ("run", "merged"))
    assert with_adapters["val_loss"] != pytest.approx(with_adapters["loss"], rel=1e-3)
    assert merged["val_loss"] == pytest.approx(with_adapters["val_loss"], rel=1e-5)
    again = export_hf(root / "run" / "checkpoints" / "step_00000002", tmp_path / "again")
    exported = root / "run" / "hf" / "step_00000002"
    assert_same_tensors(tensors(exported), tensors(again))
