"""NeMo 2 at work on the CPU: it builds, saves and loads models by its own connectors.

Imports NeMo at once, which takes half a minute.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.llm.gpt.model.llama import Llama31Config
from nemo.collections.llm.gpt.model.mixtral import MixtralConfig
from nemo.collections.llm.gpt.model.qwen3 import Qwen3Config, Qwen3MoEConfig
from nemo.lightning import io
from nemo.lightning.base import teardown
from nemo.lightning.io import pl
from nemo.lightning.io.state import _ModelState
from torch import Tensor

from megatron_deft.convert.ours import single_process
from megatron_deft.integrations.nemo_checkpoint import UNFUSED
from megatron_deft.platform import cpu_platform

SIZES: dict[str, Any] = {
    **UNFUSED,
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 128,
    "bf16": False,
    "params_dtype": torch.float32,
}
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
}


def models() -> dict[str, tuple[Any, Any]]:
    """Model class and config of every shape, as NeMo's own classes have them."""
    bf16 = {"params_dtype": torch.bfloat16, "bf16": True}
    return {
        "llama": (llm.LlamaModel, llm.LlamaConfig(**{**SIZES, "vocab_size": 301})),
        "llama31_tied_bf16": (
            llm.LlamaModel,
            Llama31Config(
                **{**SIZES, **bf16, "vocab_size": 301},
                scale_factor=4.0,
                old_context_len=32,
                rotary_base=5000,
                share_embeddings_and_output_weights=True,
            ),
        ),
        "mistral_padded": (
            llm.MistralModel,
            llm.MistralConfig7B(**SIZES, window_size=None, cp_comm_type=None, kv_channels=12),
        ),
        "qwen2": (llm.Qwen2Model, llm.Qwen2Config(**SIZES, vocab_size=310)),
        "qwen3_tied": (
            llm.Qwen3Model,
            Qwen3Config(
                **{**SIZES, "share_embeddings_and_output_weights": True},
                vocab_size=301,
                kv_channels=16,
            ),
        ),
        "qwen3_moe": (
            llm.Qwen3Model,
            Qwen3MoEConfig(
                **SIZES, **EXPERTS, vocab_size=301, kv_channels=16, moe_ffn_hidden_size=24
            ),
        ),
        "mixtral": (llm.MixtralModel, MixtralConfig(**SIZES, **EXPERTS)),
    }


@contextmanager
def platform() -> Iterator[None]:
    """NeMo's last step of loading moves tensors to the GPU; without one they stay."""
    move = pl._fix_tensors_device
    with cpu_platform():
        pl._fix_tensors_device = lambda checkpoint: checkpoint
        try:
            yield
        finally:
            pl._fix_tensors_device = move


def _trainer(**options: Any) -> Any:
    # asynchronous saving wants tensorstore, which this megatron-core has not
    strategy = nl.MegatronStrategy(ckpt_async_save=False, **options)
    return nl.Trainer(devices=1, accelerator="cpu", strategy=strategy)


def save(folder: Path, model_class: Any, config: Any, tokenizer: Path) -> None:
    """A checkpoint of random weights, saved as NeMo's importers save theirs."""
    lightning.seed_everything(7)
    with platform():
        connector = io.ModelConnector("/none")
        model = model_class(config, tokenizer=AutoTokenizer(str(tokenizer)))
        trainer = _trainer(ckpt_save_optimizer=False, always_save_context=True)
        connector.nemo_setup(model, trainer)
        with torch.no_grad():
            for parameter in model.parameters():  # whose memory nobody has written to
                noise = torch.randn_like(parameter)
                wide = parameter.ndim == 2
                parameter.copy_(noise / parameter.shape[1] ** 0.5 if wide else 1 + 0.2 * noise)
        connector.nemo_save(folder, trainer)
        teardown(trainer, model)


def load(folder: Path, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The weights and the logits [b, s, v] of a checkpoint that NeMo has loaded."""
    with platform():
        trainer = _trainer(ddp="pytorch", setup_optimizers=False)
        model, _ = io.ModelConnector(str(folder)).nemo_load(folder, trainer)
        model.eval().float()  # bf16's rounding would hide what is to be compared
        weights = {k: v.clone() for k, v in model.state_dict().items() if v is not None}
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        model_parallel_cuda_manual_seed(1)  # which dropout of 0 asks for
        with torch.no_grad():
            logits = model.module(ids, positions, None)
        teardown(trainer, model)
    return weights, logits


def exported(folder: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors, in fp32, and config.json of a checkpoint, as NeMo's own Hugging Face exporter maps.

    Its apply() would load a model of TransformerEngine, so the tensors come from the checkpoint.
    """
    context = io.load_context(folder, subpath="model")
    exporter = context.exporter("hf", folder)
    exporter.trust_remote_code = False
    target = exporter.init().float()
    layers = {name: tensor.float() for name, tensor in _layers(folder).items()}
    source = _ModelState(layers, context.config)
    found = exporter.convert_state(source, target)
    tensors = dict(found.state_dict())
    if found.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    return tensors, exporter.config


def _layers(folder: Path) -> dict[str, Tensor]:
    """The tensors under TransformerEngine's names, layer by layer and expert by expert."""
    with single_process():
        stored = dist_checkpointing.load_plain_tensors(str(folder / "weights"))
    found: dict[str, Tensor] = {}
    experts = any(".experts." in key for key in stored)
    for key, value in stored.items():
        if not isinstance(value, Tensor):
            continue
        name = key.removeprefix("module.")
        if not name.startswith("decoder.layers."):
            found[name] = value
            continue
        rest = name.removeprefix("decoder.layers.")
        if experts and rest == "mlp.linear_fc1.layer_norm_weight":
            rest = "pre_mlp_layernorm.weight"
        for i, layer in enumerate(value):
            found |= _experts(f"decoder.layers.{i}.{rest}", layer)
    return found


def _experts(name: str, layer: Tensor) -> dict[str, Tensor]:
    if ".experts.experts." not in name:
        return {name: layer}
    local = name.replace(".experts.experts.", ".experts.local_experts.{}.")
    grouped = name.replace(".experts.experts.", ".experts.") + "{}"
    return {form.format(e): t for e, t in enumerate(layer) for form in (local, grouped)}
