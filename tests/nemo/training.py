"""A tiny model trained by NeMo's own llm.finetune on the CPU.

Imports NeMo at once, which takes half a minute. As a script it trains on as many ranks as torchrun
has started, in every layout that it is given.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import fiddle
import lightning.pytorch as pl
import nemo_run as run
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.lightning.base import teardown
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule

from megatron_deft.integrations.nemo import deft_finetune_recipe
from megatron_deft.integrations.nemo_settings import DATASET_KWARGS
from tests.nemo.cpu import nemo_on_cpu
from tests.nemo.real import SIZES
from tests.nemo.witness import Witness

LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {},
    "micro_batch": {},  # data-parallel as well
    "tensor": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32},
}
"""Of two ranks: settings of the strategy."""


def write_data(folder: Path, samples: int = 16) -> Path:
    """Files of samples whose answers have from one to a dozen words, all the same."""
    folder.mkdir()
    draw = random.Random(3)
    for split in ("training", "validation"):
        lines = []
        for i in range(samples):
            answer = " ".join(str(i % 10) for _ in range(draw.randint(1, 12)))
            line = {"input": f"what is {i} plus {i}?\n", "output": f"{answer}<|im_end|>"}
            lines.append(json.dumps(line))
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
            llm.LlamaModel, config=run.Config(llm.LlamaConfig, **SIZES)
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
            dataset_kwargs=dict(DATASET_KWARGS),
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


def finetune(recipe: Any, *callbacks: pl.Callback, store: Path | None = None) -> None:
    """Run the recipe with more callbacks before its own, which need not serialise.

    store: a new file by which two ranks find each other; None: there is one rank
    """
    task = fiddle.build(recipe)
    trainer = task.keywords["trainer"]
    trainer.callbacks[:0] = callbacks
    # not by a port, which may be taken by now
    trainer.strategy.store = dist.HashStore() if store is None else dist.FileStore(str(store), 2)
    with nemo_on_cpu():
        try:
            task()
        finally:
            teardown(trainer, task.keywords["model"])
            destroy_num_microbatches_calculator()


def train_and_check(
    base: Any, spec: str, reduction: str = "token", store: Path | None = None
) -> Witness:
    """Train `base` with an objective, whose gradients and metrics are then the formula's."""
    recipe = deft_finetune_recipe(base, spec, reduction=reduction)
    witness = Witness(spec, reduction)
    finetune(recipe, witness, store=store)
    witness.check(base.trainer.max_steps)
    return witness


def train_layout(name: str, folder: Path, data: Path, tokenizer: Path) -> None:
    """Two steps on two ranks; an objective that drops tokens makes the ranks' counts differ."""
    base = tiny_recipe(data, tokenizer, folder / "logs" / name)
    base.trainer.devices = 2
    for field, value in LAYOUTS[name].items():
        setattr(base.trainer.strategy, field, value)
    reduction = "micro_batch" if name == "micro_batch" else "token"
    if reduction == "micro_batch":
        base.trainer.strategy.ddp.average_in_collective = False  # which gloo cannot
    # torchrun's own store has the keys of the layouts before
    train_and_check(base, "OnlyTopP-0.1", reduction, folder / f"{name}.store")


def main(folder: Path, data: Path, tokenizer: Path) -> None:
    """Train in each layout and leave FOLDER/LAYOUT-RANK behind where it went as it should."""
    for name in LAYOUTS:
        train_layout(name, folder, data, tokenizer)
        (folder / f"{name}-{os.environ['RANK']}").touch()


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
