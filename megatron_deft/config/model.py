"""The model of a run: its weights and precision, its layout, and how the loss is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_deft.config.section import Section
from megatron_deft.config.values import (
    AT_LEAST_0,
    AT_LEAST_1,
    BELOW_1,
    MODULES,
    NOT_EMPTY,
    key,
)
from megatron_deft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The weights training starts from (load or hf), and the precision it runs in."""

    path: ClassVar[str] = "model."
    load: str | None = key(
        "folder written by `megatron-deft convert import` or by training", None, NOT_EMPTY
    )
    hf: str | None = key(
        "Hugging Face folder, or a model in the local cache by its name; takes the place of load. "
        "It is loaded as `convert import` would have converted it, without the proof",
        None, NOT_EMPTY,
    )  # fmt: skip
    dtype: Literal["fp32", "bf16", "fp16"] = key(
        "precision of weights and activations; main weights, gradients and optimizer state are "
        "fp32 in all; fp16 scales the loss, see optim.loss_scale", "bf16"
    )  # fmt: skip
    fp8: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = key(
        "run the layers' matrix products in FP8 by this recipe: with TransformerEngine, on GPUs "
        "that have it, with dtype bf16", None
    )  # fmt: skip
    attention_dropout: float = key("probability of dropping an attention weight", 0.0, BELOW_1)
    hidden_dropout: float = key("probability of dropping a residual-branch output", 0.0, BELOW_1)
    recompute: Literal["none", "selective", "full"] = key(
        "activations that the backward pass computes again: none; those of recompute_modules; or "
        "whole layers (least memory, about a third more compute)", "none"
    )  # fmt: skip
    recompute_modules: tuple[str, ...] = key(
        "for selective: core_attn (scores of attention, which fused attention never keeps), "
        "layernorm (what norms make), mlp, moe (experts with their router); none named: core_attn",
        (), MODULES
    )  # fmt: skip
    recompute_method: Literal["uniform", "block"] = key(
        "for full: keep the input of every recompute_layers-th layer; or recompute the first "
        "recompute_layers layers of each stage's chunk, and no other", "uniform"
    )  # fmt: skip
    recompute_layers: int | None = key("for full: see recompute_method; null: 1", None, AT_LEAST_1)

    mtp_layers: int = key(
        "heads of multi-token prediction, each a layer that predicts one token further, trained "
        "with the same objective; new where the weights have none", 0, AT_LEAST_0
    )  # fmt: skip
    mtp_loss_weight: float = key(
        "what the mean of the heads' losses, each per token of the loss, counts for beside it",
        0.1,
        AT_LEAST_0,
    )

    def __post_init__(self) -> None:
        """One of load and hf."""
        super().__post_init__()
        if (self.load is None) == (self.hf is None):
            given = "neither is set" if self.load is None else f"{self.load} and {self.hf}"
            raise UserError(f"model.load and model.hf: {given}; set one of them, the other is null")
        default = type(self).mtp_loss_weight
        if not self.mtp_layers and self.mtp_loss_weight != default:
            raise UserError(
                f"model.mtp_loss_weight={self.mtp_loss_weight:g} without heads of multi-token "
                "prediction: set model.mtp_layers, or leave it out"
            )
        if self.fp8 is not None and self.dtype != "bf16":
            raise UserError(
                f"model.fp8={self.fp8} with model.dtype={self.dtype}: its weights are in bf16; set "
                "model.dtype=bf16, or model.fp8=null"
            )
        if self.fp8 == "delayed" and "layernorm" in self.recompute_modules:
            raise UserError(
                "model.recompute_modules=layernorm with model.fp8=delayed: megatron-core cannot; "
                "leave it out, or set another recipe"
            )
        if self.recompute_modules and self.recompute != "selective":
            raise UserError(
                f"model.recompute_modules={list(self.recompute_modules)} with model.recompute="
                f"{self.recompute}: set model.recompute=selective, or name no modules"
            )
        if self.recompute != "full" and (self.recompute_layers, self.recompute_method) != (
            None, "uniform"
        ):  # fmt: skip
            raise UserError(
                f"model.recompute_method={self.recompute_method}, model.recompute_layers="
                f"{self.recompute_layers or 'null'} with model.recompute={self.recompute}: they "
                "are for full; set it, or leave them out"
            )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How the processes share the model; the rest of them is data parallel."""

    path: ClassVar[str] = "parallel."
    tensor: int = key(
        "processes that share each layer's matrices and the vocabulary", 1, AT_LEAST_1
    )
    pipeline: int = key("processes that share the layers, in consecutive blocks", 1, AT_LEAST_1)
    account_for_embedding: bool = key(
        "count the embedding as a layer where layers are divided among those processes: the first "
        "gets one less", False
    )  # fmt: skip
    account_for_loss: bool = key("likewise the output layer and the loss, on the last", False)
    first_stage_layers: int | None = key(
        "layers of the first of those processes; the others share the rest equally; not together "
        "with account_for_*; null: as all", None, AT_LEAST_1
    )  # fmt: skip
    last_stage_layers: int | None = key("likewise of the last", None, AT_LEAST_1)
    virtual_pipeline: int | None = key(
        "blocks of layers that each of those processes holds, run in turns (interleaved schedule); "
        "null or 1: one", None, AT_LEAST_1
    )  # fmt: skip
    expert: int = key(
        "data- (and context-) parallel processes that share the experts of each layer",
        1, AT_LEAST_1
    )  # fmt: skip
    expert_tensor: int | None = key(
        "processes that share each expert's matrices; null: parallel.tensor. With 1 the tensor "
        "processes can share whole experts instead: parallel.expert then counts them too",
        None, AT_LEAST_1
    )  # fmt: skip
    context: int = key(
        "processes that share each sequence: keys and values are exchanged, the rest is split",
        1, AT_LEAST_1
    )  # fmt: skip
    context_comm: Literal["all_gather", "p2p", "a2a"] | None = key(
        "how they exchange keys and values: gathered; round a ring (p2p); or traded for attention "
        "heads (a2a); the latter two with TransformerEngine alone. null: p2p with it, else "
        "all_gather", None
    )  # fmt: skip
    sequence: bool = key("shard norms and dropout over the sequence among the tensor ranks", False)
    distributed_optimizer: bool = key("shard optimizer state among the data-parallel ranks", True)
    overlap_grad_reduce: bool = key("reduce gradients while the backward pass still runs", False)
    overlap_param_gather: bool = key(
        "gather updated parameters while the next forward pass runs; needs distributed_optimizer "
        "and overlap_grad_reduce", False
    )  # fmt: skip
    gradient_accumulation_fusion: Literal["auto", True, False] = key(
        "add weights' gradients to their fp32 sums within the matrix product, by apex's kernel; "
        "auto: on a GPU where it is installed", "auto"
    )  # fmt: skip
    vocab_pad_multiple: int = key(
        "the vocabulary is padded to a multiple of this times parallel.tensor", 128, AT_LEAST_1
    )

    @property
    def chunks(self) -> int:
        """Blocks of layers that one process holds."""
        return self.virtual_pipeline or 1


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """How the loss is computed; what it is does not change."""

    path: ClassVar[str] = "loss."
    fused_linear: Literal["auto", True, False] = key(
        "make the loss from hidden states and output layer, a chunk of logits at a time and of "
        "trained tokens alone; auto: with an output layer that allows it and is not tiny", "auto"
    )  # fmt: skip
    chunk_tokens: int | None = key(
        "rows of logits that exist at a time; null: 40 MiB of them on the CPU, 64 in fp32; on a "
        "GPU 1 GiB, and at least 4096 rows", None, AT_LEAST_1
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Chunks are of the loss without logits."""
        super().__post_init__()
        if self.fused_linear is False and self.chunk_tokens is not None:
            raise UserError(
                f"loss.chunk_tokens={self.chunk_tokens} with loss.fused_linear=false: all logits "
                "exist there; set loss.fused_linear to true or auto, or leave it out"
            )
