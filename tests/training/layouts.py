"""Tiny models and layouts that whole runs are tested with."""

import shutil
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from megatron_deft.convert.hf import import_hf
from tests.convert.tiny_models import COMMON, make

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
    # stages of several lengths, some of none
    "two": LlamaConfig(**SHAPE | {"num_hidden_layers": 2}, tie_word_embeddings=True),
    "five": LlamaConfig(**SHAPE | {"num_hidden_layers": 5}, tie_word_embeddings=True),
    "six": LlamaConfig(**SHAPE | {"num_hidden_layers": 6}, tie_word_embeddings=False),
}
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
MTP: Keys = {"model.mtp_layers": 2, "model.mtp_loss_weight": 0.3}
RECOMPUTE: Keys = {"model.recompute": "full"}
CP2: Keys = {"parallel.context": 2}
GATHER: Keys = {**OVERLAP, "parallel.overlap_param_gather": "true"}
ETP1: Keys = {**SEQUENCE, "parallel.expert_tensor": 1}
EMBEDDING: Keys = {"parallel.account_for_embedding": "true"}
LOSS: Keys = {"parallel.account_for_loss": "true"}
COUNTED = EMBEDDING | LOSS
FIRST = "parallel.first_stage_layers"
LAST = "parallel.last_stage_layers"


def make_models(base: Path, root: Path, *names: str) -> None:
    """ROOT/val.jsonl, and of each model ROOT/MODEL/train.jsonl, ROOT/MODEL/hf, ROOT/MODEL/megatron.

    base: the folder of the fixture of that name, whose data and tokenizer they have
    """
    shutil.copy(base / "val.jsonl", root)
    for name in names:
        hf = make(root / name / "hf", MODELS[name])
        for file in (base / "hf").iterdir():
            if not (hf / file.name).exists() and file.suffix != ".safetensors":
                shutil.copy(file, hf)
        shutil.copy(base / "train.jsonl", root / name)
        import_hf(hf, root / name / "megatron", verify=False)
