"""A tiny model trained by NeMo's own llm.finetune on the CPU, and a witness of its gradients.

Imports NeMo at once, which takes half a minute.
"""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fiddle
import lightning.pytorch as pl
import nemo_run as run
import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.lightning.base import teardown
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from torch import Tensor

from megatron_deft.integrations.nemo import deft_finetune_recipe
from megatron_deft.platform import cpu
from tests.nemo.real import SIZES
from tests.oracle import loss_and_grad

VOCAB = 301


def _called_from(depth: int) -> bool:
    """Whether the caller `depth` frames up is megatron-core or NeMo."""
    name = str(sys._getframe(depth + 1).f_globals.get("__name__", ""))
    return name.startswith(("megatron.core", "nemo."))


class _NemosCudaMeansCpu(cpu._CudaMeansCpu):
    """NeMo's training loop spells its device "cuda" as well, and logs by tensor.to("cuda")."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.to and args[1:] == ("cuda",) and _called_from(1):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


@contextmanager
def nemo_on_cpu() -> Iterator[None]:
    """megatron-core and NeMo's training loop on a machine without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_CudaMeansCpu", _NemosCudaMeansCpu)
        # the subclass's method stands between the caller and the one that asks
        patch.setattr(cpu, "_called_from_megatron", lambda: _called_from(2) or _called_from(3))
        # the ranks wait by it for the first one's index of the samples
        patch.setattr(torch.cuda, "LongTensor", torch.LongTensor)
        with cpu.cpu_platform():
            yield


def write_data(folder: Path, samples: int = 16) -> Path:
    """Files of samples whose answers have from one to a dozen words."""
    folder.mkdir()
    draw = random.Random(3)
    for split in ("training", "validation"):
        lines = []
        for i in range(samples):
            answer = " ".join(str(2 * i) for _ in range(draw.randint(1, 12)))
            lines.append(json.dumps({"input": f"what is {i} plus {i}?", "output": f" {answer}"}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tiny_recipe(data: Path, tokenizer: Path, logs: Path, steps: int = 2) -> Any:
    """A NeMo recipe as its users have them, of a size for tests."""
    # as NeMo's recipes for speed have it
    ddp = run.Config(DistributedDataParallelConfig, average_in_collective=True)
    strategy = run.Config(nl.MegatronStrategy, ddp=ddp, ckpt_async_save=False)
    return run.Partial(
        llm.finetune,
        model=run.Config(
            llm.LlamaModel, config=run.Config(llm.LlamaConfig, **SIZES, vocab_size=384)
        ),
        trainer=run.Config(
            nl.Trainer, accelerator="cpu", devices=1, max_steps=steps, strategy=strategy,
            use_distributed_sampler=False, limit_val_batches=1, num_sanity_val_steps=0,
            val_check_interval=steps, callbacks=[], enable_checkpointing=False,
        ),
        data=run.Config(
            llm.FineTuningDataModule, dataset_root=str(data), seq_length=64, micro_batch_size=2,
            global_batch_size=8, num_workers=0, pin_memory=False,
            tokenizer=run.Config(AutoTokenizer, str(tokenizer)),
            dataset_kwargs={
                "prompt_template": "{input}{output}", "truncation_field": "output",
            },
        ),
        optim=run.Config(
            MegatronOptimizerModule,
            config=run.Config(
                OptimizerConfig, optimizer="adam", lr=1e-2, bf16=False, fp16=False,
                use_distributed_optimizer=False, clip_grad=1.0,
            ),
            lr_scheduler=run.Config(
                CosineAnnealingScheduler, warmup_steps=0, constant_steps=0, min_lr=0.0
            ),
        ),
        log=run.Config(nl.NeMoLogger, log_dir=str(logs), ckpt=None, use_datetime_version=False),
        tokenizer="data",
    )  # fmt: skip


class Witness(pl.Callback):
    """Keeps the batches and gradients of every training step, and what the oracle says of them."""

    def __init__(self, spec: str, reduction: str = "token") -> None:
        self.spec, self.reduction = spec, reduction
        self.batches: list[dict[str, Tensor]] = []
        self.steps: list[dict[str, Any]] = []
        self.weights: list[Tensor] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        model_parallel_cuda_manual_seed(1)  # which NeMo does where it counts a GPU

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in pl_module.named_parameters():
                # whose memory nobody has written to; sure of some tokens, and wrongly of most
                scale = 3.0 if "output_layer" in name else 1.0
                noise = torch.randn_like(parameter)
                wide = parameter.ndim == 2
                parameter.copy_(
                    scale * noise / parameter.shape[1] ** 0.5 if wide else 1 + 0.2 * noise
                )

    def on_megatron_microbatch_start(self, step: Any, batch: Any) -> None:
        """As the data are; the objective's callback comes later."""
        if not step.forward_only:
            self.batches.append({k: v.clone() for k, v in batch.items() if v is not None})

    def on_megatron_step_end(self, step: Any, reduced: Tensor) -> None:
        if step.forward_only:
            return
        module = step.model
        while hasattr(module, "module"):
            module = module.module
        named = dict(module.named_parameters())
        loss, gradients = self._oracle(module, list(named.values()))
        self.steps.append(
            {
                "reduced": float(reduced),
                "loss": loss,
                "oracle": dict(zip(named, gradients, strict=True)),
                "found": {k: p.main_grad.clone() for k, p in named.items()},
            }
        )
        self.weights.append(module.output_layer.weight.detach().clone())
        self.batches.clear()

    def _oracle(self, module: Any, parameters: list[Tensor]) -> tuple[float, list[Tensor]]:
        """The token mean, or mean of the micro-batches' means, in float64 down to the logits."""
        parts = []
        for batch in self.batches:
            with torch.enable_grad():
                logits = module(batch["tokens"], batch["position_ids"], batch["attention_mask"])
            logits = logits.flatten(0, 1)
            labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100).flatten()
            ones = torch.ones_like(labels, dtype=torch.float64)
            loss, grad, keep, _ = loss_and_grad(self.spec, logits, labels, VOCAB, ones)
            parts.append((logits, loss.sum(), grad, keep.sum()))
        ranks, (losses, total) = (
            dist.get_world_size(),
            _added(
                torch.stack(
                    [sum(value for _, value, *_ in parts), sum(count for *_, count in parts)]
                )
            ),
        )
        means = {
            "token": [total] * len(parts),
            "micro_batch": [c * len(parts) * ranks for *_, c in parts],
        }
        upstream = [
            (grad / n).float()
            for (_, _, grad, _), n in zip(parts, means[self.reduction], strict=True)
        ]
        gradients = torch.autograd.grad([logits for logits, *_ in parts], parameters, upstream)
        return float(losses / total), [_added(gradient) for gradient in gradients]

    def check(self) -> None:
        """Assert that every step minimised what the formula says, and did step."""
        assert len(self.steps) == 2
        for step in self.steps:
            assert step["reduced"] == pytest.approx(step["loss"], rel=1e-5)
            for name, found in step["found"].items():
                expected = step["oracle"][name]
                assert expected.norm() > 0, name
                tolerance = 1e-5 * float(expected.abs().max())
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=tolerance, msg=name)
        assert not torch.equal(*self.weights)


def _added(values: Tensor) -> Tensor:
    """The sum over data-parallel ranks."""
    values = values.clone()
    dist.all_reduce(values)
    return values


def finetune(recipe: Any, *callbacks: pl.Callback) -> None:
    """Run the recipe with more callbacks before its own, which need not serialise."""
    task = fiddle.build(recipe)
    trainer = task.keywords["trainer"]
    trainer.callbacks[:0] = callbacks
    with nemo_on_cpu():
        task()
        teardown(trainer, task.keywords["model"])


def train_and_check(spec: str, reduction: str, data: str, tokenizer: str, logs: str) -> None:
    """Two steps on as many ranks as there are, whose gradients are the formula's."""
    base = tiny_recipe(Path(data), Path(tokenizer), Path(logs))
    base.trainer.devices = int(os.environ.get("WORLD_SIZE", "1"))
    if base.trainer.devices > 1 and reduction == "micro_batch":
        base.trainer.strategy.ddp.average_in_collective = False  # which gloo cannot
    recipe = deft_finetune_recipe(base, spec, reduction=reduction, vocab_size=VOCAB)
    witness = Witness(spec, reduction)
    finetune(recipe, witness)
    witness.check()


if __name__ == "__main__":
    train_and_check(*sys.argv[1:])
