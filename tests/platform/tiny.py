"""A tiny model trained through all of megatron-core, in whatever layout the caller asks for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from megatron_deft.models.build import build_model, transformer_config
from megatron_deft.models.families import ModelSpec

SPEC = ModelSpec(
    family="llama",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=84,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=None,
    tied_embeddings=True,
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    initializer_range=0.3,
)
VOCAB_PAD = 8  # 84 becomes 88 at TP1 and 96 at TP2
GLOBAL_BATCH = 8
STEPS = 3


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    dtype: str = "fp32"
    recompute: str = "none"
    dropout: float = 0.0
    overlap: bool = False


def build(layout: Layout) -> GPTModel:
    tcfg = transformer_config(
        SPEC,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        sequence=layout.sequence,
        dtype=layout.dtype,
        recompute=layout.recompute,
        attention_dropout=layout.dropout,
        hidden_dropout=layout.dropout,
        calculate_per_token_loss=True,
    )
    return build_model(SPEC, tcfg, vocab_pad_multiple=VOCAB_PAD)


def save(model: GPTModel, folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(folder))


def load(model: GPTModel, folder: Path) -> None:
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)))


def micro_batches(step: int) -> list[dict[str, torch.Tensor]]:
    """The global batch of a step; micro-batches of one sample differ in length."""
    generator = torch.Generator().manual_seed(step)
    batches = []
    for index in range(GLOBAL_BATCH):
        length = 8 + 4 * ((index + step) % 3)  # a multiple of the largest tensor size
        tokens = torch.randint(0, SPEC.vocab_size, (1, length + 1), generator=generator)
        positions = torch.arange(length)[None]
        batches.append(
            {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions}
        )
    return batches


def whole_logits(logits: torch.Tensor) -> torch.Tensor:
    """[b, s, v/tp] of this rank -> [b, s, v] without padding, on every rank."""
    whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    return whole[..., : SPEC.vocab_size]


def forward_step(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None)

    def loss_function(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        logits = whole_logits(output).float().flatten(0, 1)
        loss = F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")
        tokens = torch.tensor(batch["labels"].numel(), dtype=torch.int)
        return loss, tokens, {"loss": loss.detach(), "tokens": tokens}

    return output, loss_function


def mean_loss(parts: list[dict[str, torch.Tensor]]) -> float:
    """Of the whole global batch, on every rank: only the last stages hold parts of it."""
    sums = torch.stack(
        [sum((part[key] for part in parts), torch.tensor(0.0)) for key in ("loss", "tokens")]
    )
    dist.all_reduce(sums)  # Every tensor-parallel rank counts the same parts: the ratio stays.
    return float(sums[0] / sums[1])


def train(model: GPTModel, layout: Layout) -> tuple[list[float], list[float]]:
    """STEPS steps; the losses and the gradient norms."""
    inner = Float16Module(model.config, model) if layout.dtype == "bf16" else model
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=layout.overlap,
        grad_reduce_in_fp32=True,
        bucket_size=2000 if layout.overlap else None,
    )
    ddp = DistributedDataParallel(model.config, ddp_config, inner)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.01,
            weight_decay=0.01,
            clip_grad=1.0,
            bf16=layout.dtype == "bf16",
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=True,
        ),
        [ddp],
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    if layout.overlap:
        model.config.no_sync_func = ddp.no_sync
    rank = parallel_state.get_data_parallel_rank()
    world = parallel_state.get_data_parallel_world_size()
    losses, norms = [], []
    for step in range(STEPS):
        mine = micro_batches(step)[rank::world]
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        parts = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(mine),
            model=[ddp],
            num_microbatches=len(mine),
            seq_length=SPEC.max_position_embeddings,
            micro_batch_size=1,
            forward_only=False,
        )
        updated, norm, _ = optimizer.step()
        assert updated
        losses.append(mean_loss(parts))
        norms.append(float(norm))
    return losses, norms


@torch.no_grad()
def logits_of(model: GPTModel) -> torch.Tensor:
    """Logits [1, s, vocab] of the first sample of step 0; the whole model must be on this rank."""
    model.eval()
    batch = micro_batches(0)[0]
    return whole_logits(model(batch["tokens"], batch["position_ids"], None)).float()
