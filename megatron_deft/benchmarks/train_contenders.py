"""The contenders of `bench train`, each a process of its own: `python -m` this NAME SETTINGS.

SETTINGS is a JSON file. The process builds its trainer and prints a line of JSON; for every line
that it then reads it runs one optimizer step and prints another. What else is said goes to stderr.
A process for each: none runs in what another redirected (see platform.cpu), or in its memory.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Settings = dict[str, Any]


class Turns:
    """The line to the process that asks for steps."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever prints

    def tell(self, **found: Any) -> None:
        """Send a line."""
        self._out.write(json.dumps(found) + "\n")
        self._out.flush()

    def wait(self) -> bool:
        """Whether another step is asked for."""
        return bool(sys.stdin.readline())


def _finish() -> float:
    """Now, with the device's work done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def megatron(
    turns: Turns, settings: Settings, fused_linear: str = "auto", own_loss: bool = False
) -> None:
    """Steps of `megatron-deft train`'s Trainer.

    own_loss: with megatron-core's own cross-entropy, and nothing else logged of a token
    """
    from megatron_deft import platform
    from megatron_deft.config import load_config
    from megatron_deft.training.base import read_base
    from megatron_deft.training.run import initialize

    warnings.filterwarnings("ignore")
    empty = Path(settings["work"]) / "empty.yaml"
    keys = {
        "objective": settings["objective"],
        "run_dir": Path(settings["work"]) / settings["name"],
        "model.hf": settings["model"],
        "model.dtype": settings["dtype"],
        "data.train_sets": f"[{settings['data']}]",
        "data.max_length": settings["length"] + 1,
        "data.shuffle": "false",
        "data.show_sample": "false",
        # megatron-core counts the columns that pad the vocabulary: let there be none
        "parallel.vocab_pad_multiple": 1,
        "loss.fused_linear": fused_linear,
        "optim.schedule": "constant",
        "optim.warmup_ratio": 0,
        "optim.lr": settings["lr"],
        "train.global_batch": settings["batch"],
        "train.micro_batch": settings["micro_batch"],
        "train.steps": settings["steps"],
        "monitor.tensorboard": "false",
    }
    cfg = load_config(empty, [f"{key}={value}" for key, value in keys.items()])
    base = read_base(cfg.model)
    cfg.validate(1, base.spec)
    initialize(cfg)
    from megatron_deft.training.trainer import Trainer

    trainer = Trainer(cfg, base)
    path = trainer.attachment.path
    if own_loss:
        trainer.attachment.detach()
        trainer.forward_step = partial(  # type: ignore[method-assign]
            _own_loss_step, trainer.denominator
        )
        path = "logits, megatron-core's own cross-entropy"
    turns.tell(path=path)
    while turns.wait():
        begin = _finish()
        metrics = trainer.step()
        seconds = _finish() - begin
        loss = {"ce": metrics["loss"]} if own_loss else {k: metrics[k] for k in ("loss", "ce")}
        turns.tell(seconds=seconds, peak_bytes=_peak_bytes(), tokens=metrics["tokens"], **loss)
    platform.shutdown()


def _own_loss_step(
    denominator: Any, validating: bool, landscape_vocab: int | None
) -> Callable[..., Any]:
    """A micro-batch as Megatron-LM's own scripts run it: the sum of the trained tokens' losses."""
    from megatron_deft.data.batches import to_device
    from megatron_deft.platform import device
    from megatron_deft.training.statistics import SUMS, sums_size

    def run(batches: Iterator[Any], model: Any) -> Any:
        batch = to_device(next(batches), device())
        mask = batch["weights"]
        output = model(
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"].clamp(min=0),
            loss_mask=mask,
        )  # fmt: skip
        return output, partial(loss_function, mask)

    def loss_function(mask: Tensor, loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, count = (loss.float() * mask).sum(), mask.sum().double()
        denominator.total += count
        sums = torch.zeros(
            sums_size(landscape_vocab is not None), dtype=torch.float64, device=loss.device
        )
        for name, value in (
            ("objective", total), ("denominator", count), ("kept_tokens", count), ("weight", count)
        ):  # fmt: skip
            sums[SUMS.index(name)] = value.detach()
        return total, torch.ones((), dtype=torch.int, device=loss.device), {"sums": sums}

    return run


def hugging_face(turns: Turns, settings: Settings) -> None:
    """Steps of Hugging Face Trainer with the released DEFT formula, in eager torch."""
    import transformers

    from megatron_deft.benchmarks.contenders import released_deft
    from megatron_deft.data.indexed import open_set
    from megatron_deft.data.samples import IGNORE

    found = open_set(settings["data"])

    class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
        def __len__(self) -> int:
            return len(found)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            sample = found[index]
            tokens = torch.from_numpy(sample.tokens.astype("int64"))
            labels = tokens.masked_fill(torch.from_numpy(sample.weights == 0), IGNORE)
            # no trainer runs the last position: it is the last label
            return {"input_ids": tokens[:-1], "labels": labels[1:]}

    class Released(transformers.Trainer):
        total = 0.0

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(Samples())

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Tensor],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            labels = inputs.pop("labels")
            logits = model(**inputs, use_cache=False).logits
            losses = released_deft(logits.flatten(0, 1), labels.flatten())
            loss = losses.sum() / num_items_in_batch
            self.total += float(loss.detach())
            return loss

    class Turn(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.tell(path="logits, eager")
            turns.wait()
            self.begin = _finish()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = _finish() - self.begin
            loss, trainer.total = trainer.total, 0.0
            tokens = settings["batch"] * settings["length"]
            turns.tell(seconds=seconds, loss=loss, peak_bytes=_peak_bytes(), tokens=tokens)
            control.should_training_stop = not turns.wait()
            self.begin = _finish()

    is_cuda = torch.cuda.is_available()
    arguments = transformers.TrainingArguments(
        output_dir=str(Path(settings["work"]) / settings["name"]),
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["batch"] // settings["micro_batch"],
        max_steps=settings["steps"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.01,
        max_grad_norm=1.0,
        bf16=settings["dtype"] == "bf16",
        use_cpu=not is_cuda,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    )
    trainer = Released(model, arguments, train_dataset=Samples(), callbacks=[Turn()])
    # the loss divides by the labels of the whole step; so it does for models that take the count
    trainer.model_accepts_loss_kwargs = True
    trainer.train()


CONTENDERS: dict[str, Callable[[Turns, Settings], None]] = {
    "deft": megatron,
    "deft-logits": partial(megatron, fused_linear="false"),
    "core": partial(megatron, own_loss=True, fused_linear="false"),
    "hf-deft": hugging_face,
}
WHAT = {
    "deft": "megatron-deft train, DEFT",
    "deft-logits": "the same over logits (loss.fused_linear=false)",
    "core": "the same with megatron-core's own cross-entropy, nothing else logged of a token",
    "hf-deft": "Hugging Face Trainer, the released DEFT formula in eager torch",
}

if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text())
    line = Turns()
    torch.set_num_threads(given["threads"])
    CONTENDERS[sys.argv[1]](line, given | {"name": sys.argv[1]})
