"""compute_loss_func: real Hugging Face trainers, on the CPU, train with the objective."""

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("accelerate", reason="pip install accelerate")
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from megatron_deft.data.tiny import make_tiny_llama
from megatron_deft.errors import UserError
from megatron_deft.integrations.transformers import (
    ObjectiveCallback,
    ObjectiveLoss,
    compute_loss_func,
)
from tests.distributed import run_ranks
from tests.integrations.test_loss_function import call
from tests.oracle import formula

ACCUMULATED = ("nll", "deft", "dft", "eaft", "tsallis(q=0.5)")  # each token on its own
Rows = list[dict[str, list[int]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "hf"
    return make_tiny_llama(
        out, ["the cat sat on the mat"], vocab_size=280, hidden_size=32, layers=1, heads=2, seed=5
    )


def rows(count: int = 8) -> Rows:
    """Samples of 5 to 15 tokens, the first third of each not trained."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for number in range(count):
        length = 5 + (number * 3) % 11
        ids = torch.randint(3, 262, (length,), generator=generator).tolist()
        labels = [-100] * (length // 3) + ids[length // 3 :]
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return made


class InOrder(Trainer):
    """The real Trainer, but the samples come in the order of the list."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(
    folder: Path,
    out: Path,
    loss: Callable[..., Tensor] | None,
    *,
    data: Rows | None = None,
    kind: type[Trainer] = InOrder,
    callbacks: Sequence[Any] = (),
    sharpen: float = 8.0,
    **arguments: Any,
) -> Trainer:
    """A trainer of SGD with a learning rate of 1: weights minus gradient, step for step."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpen)  # else every token has p = 1 / V, and all is alike
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    chosen: dict[str, Any] = {
        "output_dir": str(out), "per_device_train_batch_size": 4, "max_steps": 1,
        "learning_rate": 1.0, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "per_device_eval_batch_size": 3,
    } | arguments  # fmt: skip
    return kind(
        model=model,
        args=TrainingArguments(**chosen),
        train_dataset=rows() if data is None else data,
        eval_dataset=rows(5),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        compute_loss_func=loss,
        callbacks=list(callbacks),
    )


def trained(trainer: Trainer) -> dict[str, Tensor]:
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("spec", ACCUMULATED)
def test_accumulated_steps_are_one_larger_batch(spec: str, folder: Path, tmp_path: Path) -> None:
    small = trainer_of(
        folder, tmp_path, compute_loss_func(spec), max_steps=2,
        per_device_train_batch_size=1, gradient_accumulation_steps=4,
    )  # fmt: skip
    large = trainer_of(folder, tmp_path, compute_loss_func(spec), max_steps=2)
    start = {name: value.detach().clone() for name, value in small.model.named_parameters()}
    ended = trained(small)
    assert_same(ended, trained(large))
    assert losses(small) == pytest.approx(losses(large), rel=1e-4)  # the trainer rounds them
    assert not torch.allclose(start["lm_head.weight"], ended["lm_head.weight"], atol=1e-4)


def test_nll_is_the_loss_that_transformers_computes(folder: Path, tmp_path: Path) -> None:
    own = trainer_of(folder, tmp_path, None, max_steps=2, gradient_accumulation_steps=2)
    ours = trainer_of(
        folder, tmp_path, compute_loss_func("nll"), max_steps=2, gradient_accumulation_steps=2
    )
    assert_same(trained(own), trained(ours))
    assert losses(own) == pytest.approx(losses(ours), rel=1e-4)
    assert own.evaluate()["eval_loss"] == pytest.approx(ours.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("spec", ["DEFT", "dft", "eaft", "Cayley_Trans"])
def test_a_step_takes_the_gradient_of_float64(spec: str, folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, compute_loss_func(spec))
    exact = copy.deepcopy(trainer.model).double()
    batch = trainer.data_collator(rows()[:4])
    labels = batch.pop("labels")[:, 1:].flatten()
    logits = exact(**batch).logits[:, :-1].flatten(0, 1)
    valid = labels != -100
    logp = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    values, keep = formula(spec, logp, logits.detach().softmax(-1), valid)
    keep = keep & valid
    assert bool(keep.any())
    loss = torch.where(keep, values, 0.0).sum() / keep.sum()
    loss.backward()
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    after = trained(trainer)
    assert losses(trainer) == [pytest.approx(loss.item(), rel=1e-3)]
    for name, value in exact.named_parameters():
        assert value.grad is not None
        scale = value.grad.abs().max().item()
        step = (before[name] - after[name]).double()
        torch.testing.assert_close(step, value.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


def test_evaluation_is_the_mean_over_its_tokens(folder: Path, tmp_path: Path) -> None:
    loss = compute_loss_func("deft")
    trainer = trainer_of(folder, tmp_path, loss, per_device_eval_batch_size=5)
    batch = trainer.data_collator(rows(5))
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = trainer.model(**batch).logits
    wanted = call("deft", logits, labels).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    hidden = [{**row, "labels": [-100] * len(row["labels"])} for row in rows(3)]
    assert trainer.evaluate(hidden)["eval_loss"] == 0.0


def test_the_callback_logs_what_the_objective_sees(folder: Path, tmp_path: Path) -> None:
    loss = compute_loss_func("deft")
    trainer = trainer_of(
        folder, tmp_path, loss, callbacks=[ObjectiveCallback(loss)],
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    model = copy.deepcopy(trainer.model)
    trainer.train()
    ended = copy.deepcopy(trainer.model)
    evaluated = trainer.evaluate()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for values, prefix, data, seen in (
        (logged, "", rows()[:4], model), (evaluated, "eval_", rows(5), ended)
    ):  # fmt: skip
        batch = trainer.data_collator(data)
        labels = batch.pop("labels")
        check = compute_loss_func("deft")
        with torch.no_grad():
            check(seen(**batch), labels)
        assert check.statistics is not None
        stats, keep = check.statistics, check.statistics.keep
        wanted = {
            "ce": -stats.logp, "p": stats.p, "gate": stats.gate, "collision": stats.collision,
            "entropy": stats.entropy, "accuracy": stats.is_argmax.float(),
        }  # fmt: skip
        for name, value in wanted.items():
            mean = value[keep].double().mean().item()
            assert values[prefix + name] == pytest.approx(mean, rel=1e-5), name
    assert trainer.state.log_history[-1]["eval_ce"] == evaluated["eval_ce"]
    assert "train_ce" not in str(trainer.state.log_history)


class Other(InOrder):
    """A trainer that computes a loss of its own, whatever it was given."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_a_run_with_another_loss_is_stopped(folder: Path, tmp_path: Path) -> None:
    def guarded(**options: Any) -> Trainer:
        loss: ObjectiveLoss = compute_loss_func("deft")
        return trainer_of(folder, tmp_path, loss, callbacks=[ObjectiveCallback(loss)], **options)

    trainer = guarded(kind=Other)
    before = trainer.model.lm_head.weight.detach().clone()
    with pytest.raises(UserError, match="did not call the loss function"):
        trainer.train()
    assert torch.equal(before, trainer.model.lm_head.weight)
    with pytest.raises(UserError, match="label_smoothing_factor"):
        guarded(label_smoothing_factor=0.1).train()
    trained(guarded())


def one_of_several(rank: int, world: int, folder: str, out: str) -> tuple[Any, Any]:
    """Two ranks of the real Trainer under DistributedDataParallel."""
    loss = compute_loss_func("deft")
    trainer = trainer_of(
        Path(folder), Path(out), loss, per_device_train_batch_size=2, max_steps=2,
        callbacks=[ObjectiveCallback(loss)],
        ddp_backend="gloo",
    )  # fmt: skip
    assert trainer.accelerator.num_processes == world
    return trained(trainer), [e for e in trainer.state.log_history if "loss" in e]


def test_devices_share_one_mean(folder: Path, tmp_path: Path) -> None:
    ranks = run_ranks(2, one_of_several, str(folder), str(tmp_path))
    loss = compute_loss_func("deft")
    single = trainer_of(folder, tmp_path, loss, max_steps=2, callbacks=[ObjectiveCallback(loss)])
    wanted = trained(single)
    logged = [entry for entry in single.state.log_history if "loss" in entry]
    for weights, entries in ranks:
        assert_same(weights, wanted)
        for mine, theirs in zip(entries, logged, strict=True):
            for name in ("loss", "ce", "p", "gate", "collision", "entropy", "accuracy"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
