"""Checkpoints of a training with an objective: they resume, and are NeMo's own in every way."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_deft.convert.hf import export_hf
from megatron_deft.convert.nemo import import_nemo
from tests.convert.tiny_models import assert_same_tensors, tensors
from tests.nemo.conftest import REASON, has_nemo

pytestmark = pytest.mark.skipif(not has_nemo(), reason=REASON)


def saving(data: Path, tokenizer: Path, logs: Path) -> Any:
    """A recipe of four steps that keeps every one."""
    import nemo_run as run
    from nemo import lightning as nl

    from tests.nemo.training import tiny_recipe

    recipe = tiny_recipe(data, tokenizer, logs, steps=4)
    recipe.trainer.enable_checkpointing = True
    recipe.trainer.check_val_every_n_epoch = None  # as recipes by name have it
    recipe.log.ckpt = run.Config(
        nl.ModelCheckpoint, monitor="reduced_train_loss", save_top_k=-1, save_last=False,
        every_n_train_steps=1, filename="{step}", save_optim_on_train_end=True,
    )  # fmt: skip
    return recipe


def checkpoint(logs: Path, step: int) -> Path:
    (found,) = logs.rglob(f"step={step - 1}")  # as NeMo counts
    return found


@pytest.fixture(scope="module")
def trained(
    data: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """The logs of a training, with its checkpoints, and the witness of it."""
    from tests.nemo.training import train_and_check

    logs = tmp_path_factory.mktemp("logs")
    return logs, train_and_check(saving(data, tokenizer, logs), "DEFT")


@pytest.fixture(scope="module")
def last(trained: tuple[Path, Any]) -> Path:
    return checkpoint(trained[0], 4)


def test_resumed_training_ends_the_same(
    trained: tuple[Path, Any], data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """One step from the end: NeMo 2.7.3 goes on with another order of the data before."""
    import nemo_run as run
    from nemo import lightning as nl

    from megatron_deft.integrations.nemo import deft_finetune_recipe
    from tests.nemo.training import Witness, finetune

    logs, whole = trained
    base = saving(data, tokenizer, tmp_path)
    base.resume = run.Config(nl.AutoResume, resume_from_path=str(checkpoint(logs, 3)))
    rest = Witness("DEFT")
    finetune(deft_finetune_recipe(base, "deft"), rest)
    rest.check(steps=1)
    assert rest.steps[0].logged == whole.steps[3].logged
    for name, parameter in whole.end.items():
        assert torch.equal(rest.end[name], parameter), name


def test_nothing_of_ours_is_in_a_checkpoint(last: Path) -> None:
    """So that it loads where only NeMo is."""
    files = [path for path in last.rglob("*") if path.is_file()]
    assert {"io.json", "model.yaml", "common.pt", ".metadata"} <= {path.name for path in files}
    for path in files:
        assert b"megatron_deft" not in path.read_bytes(), path


def test_nemo_reads_its_context(last: Path) -> None:
    from nemo.lightning import io

    context = io.load_context(last / "context", build=False)
    assert context.trainer.max_steps == 4
    assert context.trainer.callbacks == []


def test_import(trained: tuple[Path, Any], last: Path, tmp_path: Path) -> None:
    from tests.nemo import real

    import_nemo(last, tmp_path / "weights")
    export_hf(tmp_path / "weights", tmp_path / "hf")
    found = tensors(tmp_path / "hf")
    theirs, _ = real.exported(last)
    assert_same_tensors(found, theirs)
    (weight,) = (w for name, w in trained[1].end.items() if "output_layer" in name)
    rows = found["lm_head.weight"].shape[0]
    assert torch.equal(found["lm_head.weight"], weight[:rows])


def test_a_recipe_by_name_keeps_the_last_step(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    """It validates and saves after the last step alone, which is one and the same moment."""
    from megatron_deft.integrations.nemo import deft_finetune_recipe
    from tests.nemo.training import tiny_recipe, train_and_check

    named = deft_finetune_recipe("Llama-3.1-8B", dir=str(tmp_path))
    assert named.trainer.val_check_interval == named.log.ckpt.every_n_train_steps == 264
    recipe = tiny_recipe(data, tokenizer, tmp_path, steps=2)
    recipe.trainer.enable_checkpointing = True
    recipe.log = named.log
    recipe.log.tensorboard = None
    recipe.log.ckpt.every_n_train_steps = 2
    recipe.trainer.check_val_every_n_epoch = named.trainer.check_val_every_n_epoch
    train_and_check(recipe, "DEFT")
    kept = {path.parent.resolve() for path in tmp_path.rglob("weights")}
    assert len(kept) == 1, kept
    assert (kept.pop() / "context" / "model.yaml").exists()
