"""optim.cpu_offload on a GPU: the usual steps to rounding, less memory, checkpoints for both."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_deft import platform
from megatron_deft.config import RunConfig
from megatron_deft.convert.hf import import_hf
from megatron_deft.data.tiny import make_tiny_llama
from megatron_deft.training.base import read_base
from megatron_deft.training.run import initialize
from tests.convert.tiny_models import assert_same_tensors
from tests.training.ranks import config, metrics
from tests.training.test_layouts import state, step_folder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
KEYS: dict[str, Any] = {"train.steps": 4, "train.save_every": 2, "optim.warmup_ratio": 0}
SHARES = (0, 0.5, 1)
# Of the way that weights have gone. Where a gradient is about nothing, Adam makes a step of its
# rounding; and a bf16 weight that is rounded otherwise changes every gradient.
ROUNDING = {"fp32": 1e-2, "bf16": 1e-1}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of the fixture base, of a model whose optimizer is most of its memory."""
    root = tmp_path_factory.mktemp("large")
    rows = [{"question": f"what is {i} plus {i}?", "answer": f"it is {2 * i}"} for i in range(64)]
    texts = [json.dumps({"extra_info": row}) for row in rows]
    (root / "train.jsonl").write_text("\n".join(texts))
    make_tiny_llama(root / "hf", texts, vocab_size=301, hidden_size=256, layers=6)
    import_hf(root / "hf", root / "megatron", verify=False)
    return root


def train(cfg: RunConfig, save_first: bool = False) -> int:
    """Train in this process, which must be none of torchrun's.

    save_first: write the checkpoint that it goes on from once more, from what was loaded
    returns:    how many numbers the model has
    """
    assert "RANK" not in os.environ
    base = read_base(cfg.model)
    cfg.validate(1, base.spec)
    initialize(cfg)
    from megatron_deft.training.trainer import Trainer

    try:
        trainer = Trainer(cfg, base)
        if save_first:
            trainer.save()
        trainer.run()
        return sum(weight.numel() for chunk in trainer.model for weight in chunk.parameters())
    finally:
        platform.shutdown()


def optimizer_state(run_dir: Path, step: int) -> dict[str, Tensor]:
    tensors = state(step_folder(run_dir, step))
    return {key: tensor for key, tensor in tensors.items() if key.startswith("optimizer.")}


def peak(run_dir: Path) -> float:
    """Bytes, in the second step: the first one makes the state."""
    return 1e9 * metrics(run_dir)[1]["peak_memory_gb"]


@pytest.mark.parametrize("dtype", ROUNDING)
def test_like_the_usual_in_less_memory(large: Path, tmp_path: Path, dtype: str) -> None:
    keys = {**KEYS, "model.dtype": dtype}
    runs = {share: tmp_path / f"share {share}" for share in SHARES}
    for share, run_dir in runs.items():
        numbers = train(config(large, run_dir, **keys, **{"optim.cpu_offload": share}))
    usual = runs[0]
    for share in SHARES[1:]:
        for line, wanted in zip(metrics(runs[share]), metrics(usual), strict=True):
            assert line["loss"] == pytest.approx(wanted["loss"], rel=ROUNDING[dtype])
        ends, begin = [optimizer_state(runs[s], 4) for s in (share, 0)], optimizer_state(usual, 2)
        for key in (key for key in begin if key.startswith("optimizer.state.param.")):
            error, way = (ends[0][key] - ends[1][key]).norm(), (ends[1][key] - begin[key]).norm()
            assert error <= ROUNDING[dtype] * way, key
    # two moments of 4 bytes, and the fp32 weight of a 16-bit one
    bytes_each = 8 if dtype == "fp32" else 12
    for share in SHARES[1:]:
        assert peak(usual) - peak(runs[share]) > 0.8 * share * bytes_each * numbers
    for before, share in ((1, 0), (0, 1), (0, 0.5), (0.5, 1)):
        start = step_folder(runs[before], 2)
        run_dir = tmp_path / f"share {share} after {before}"
        resumed = {"optim.cpu_offload": share, "train.resume": start, "train.save_every": "null"}
        train(config(large, run_dir, **keys | resumed), save_first=True)
        assert_same_tensors(state(step_folder(run_dir, 2)), state(start))
        for line, wanted in zip(metrics(run_dir), metrics(usual)[2:], strict=True):
            assert line["loss"] == pytest.approx(wanted["loss"], rel=ROUNDING[dtype])
