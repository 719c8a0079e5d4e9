"""ModelSpec -> TransformerConfig -> GPTModel."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_deft.models.accelerators import fp8_fields, obstacle_to_context_comm
from megatron_deft.models.adapters import Adapters
from megatron_deft.models.families import ModelSpec
from megatron_deft.models.heads import head_spec
from megatron_deft.models.recompute import recompute_fields
from megatron_deft.models.rotary import inverse_frequencies
from megatron_deft.models.spec import block_spec, has_transformer_engine
from megatron_deft.platform import device

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def padded_vocab(vocab_size: int, multiple: int, tensor: int) -> int:
    """Megatron's vocabulary size: the next multiple of `multiple * tensor` from `vocab_size` on."""
    return math.ceil(vocab_size / (multiple * tensor)) * multiple * tensor


def transformer_config(
    spec: ModelSpec,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    expert: int = 1,
    virtual: int | None = None,
    context_comm: str | None = None,
    expert_tensor: int | None = None,
    account_for_embedding: bool = False,
    account_for_loss: bool = False,
    first_stage_layers: int | None = None,
    last_stage_layers: int | None = None,
    sequence: bool = False,
    dtype: str = "fp32",
    fp8: str | None = None,
    gradient_accumulation_fusion: bool = False,
    recompute: str = "none",
    recompute_modules: Sequence[str] = ("core_attn",),
    recompute_method: str = "uniform",
    recompute_layers: int = 1,
    attention_dropout: float = 0.0,
    hidden_dropout: float = 0.0,
    mtp_layers: int = 0,
    mtp_loss_weight: float = 0.1,
    calculate_per_token_loss: bool = False,
    deterministic: bool = False,
    perform_initialization: bool = True,
) -> TransformerConfig:
    """megatron-core's config of a model and its layout.

    Args:
        spec: the architecture.
        tensor, pipeline, context, expert: parallel sizes.
        virtual: model chunks of each pipeline stage (interleaved schedule); None: one.
        context_comm: how ranks that share a sequence exchange keys and values: "all_gather", or
            with TransformerEngine "p2p" or "a2a"; None: as the attention does it by itself.
        expert_tensor: ranks that share each expert's matrices; None: `tensor`.
        account_for_embedding, account_for_loss: count them as layers of the first, the last stage.
        first_stage_layers, last_stage_layers: of those stages; None: as many as each other.
        sequence: split norms and dropout along the sequence; only has effect with tensor > 1, and
            then every batch's length must be a multiple of tensor.
        dtype: "fp32", "bf16" or "fp16", of parameters, activations and what pipeline stages send.
        fp8: recipe by which TransformerEngine's matrix products run; see models/accelerators.py.
        gradient_accumulation_fusion: add weights' gradients to main_grad in their own product.
        recompute, recompute_modules, recompute_method, recompute_layers: activations that the
            backward pass computes again, see recompute_fields.
        attention_dropout, hidden_dropout: probabilities in training mode.
        mtp_layers, mtp_loss_weight: heads of multi-token prediction (models/heads.py), and what the
            mean of their losses counts for beside the loss.
        calculate_per_token_loss: the loss function returns (sum, number of tokens), and gradients
            are divided by the number over all micro-batches and data-parallel ranks.
        deterministic: prefer operations that repeat bit by bit.
        perform_initialization: false leaves the weights undefined, for a model about to be loaded.
            Not with tensor > 1: megatron-core marks a weight as split while it initialises it, and
            without that mark gradient norms count one rank's part.
    """
    assert perform_initialization or tensor == 1
    assert context_comm is None or not obstacle_to_context_comm(context_comm, spec)
    # The fusions need it, or torch.compile on a GPU.
    fused = has_transformer_engine()
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.rms_norm_eps,
        layernorm_zero_centered_gamma=spec.norm_plus_one,
        qk_layernorm=spec.qk_norm,
        softmax_scale=spec.attention_scale,
        activation_func=ACTIVATIONS[spec.activation],
        gated_linear_unit=True,
        rotary_interleaved=spec.rotary_interleaved,
        **_window(spec, mtp_layers),
        **_experts(spec, expert, expert_tensor or tensor),
        add_bias_linear=False,  # attention_out_bias and mlp_bias are in the layer spec
        add_qkv_bias=spec.qkv_bias,
        init_method_std=spec.initializer_range,
        perform_initialization=perform_initialization,
        attention_dropout=attention_dropout,
        hidden_dropout=hidden_dropout,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        cp_comm_type=context_comm,
        account_for_embedding_in_pipeline_split=account_for_embedding,
        account_for_loss_in_pipeline_split=account_for_loss,
        num_layers_in_first_pipeline_stage=first_stage_layers,
        # Of two stages the first says it all, and megatron-core would divide by the number of
        # those between them.
        num_layers_in_last_pipeline_stage=(
            None if pipeline == 2 and first_stage_layers else last_stage_layers
        ),
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=sequence and tensor > 1,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
        params_dtype=DTYPES[dtype],
        pipeline_dtype=DTYPES[dtype],
        # Micro-batches are as long as their longest sample, so stages tell each other the shape.
        # The interleaved schedule has to be called with the length: it sends while it computes.
        variable_seq_lengths=pipeline > 1 and virtual is None,
        moe_token_dispatcher_type="alltoall",  # what the check of the line above insists on
        mtp_num_layers=mtp_layers or None,
        mtp_loss_scaling_factor=mtp_loss_weight,
        cuda_graph_scope=[],  # the default is deprecated and says so for every config
        # A stage's output has been sent on; only its graph is needed for the backward pass. The
        # interleaved schedule would free it before it has waited for the send.
        deallocate_pipeline_outputs=pipeline > 1 and virtual is None,
        # Sent together, forward and backward messages of two stages are taken for one another:
        # each is the other's predecessor and successor.
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        calculate_per_token_loss=calculate_per_token_loss,
        deterministic_mode=deterministic,
        bias_activation_fusion=fused and spec.activation == "silu",
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused and not spec.rotary_interleaved,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=gradient_accumulation_fusion,
        **fp8_fields(fp8),
        **recompute_fields(recompute, recompute_modules, recompute_method, recompute_layers),
    )


def _window(spec: ModelSpec, mtp_layers: int) -> dict[str, Any]:
    """config.window_size counts the tokens before; the list marks the layers that have it."""
    if spec.window is None:
        return {}
    layers = [int(i in spec.window_layers) for i in range(spec.num_layers)]
    layers += layers[-1:] * mtp_layers  # whose numbers follow
    return {"window_size": (spec.window - 1, 0), "window_attn_skip_freq": layers}


def _experts(spec: ModelSpec, expert: int, expert_tensor: int) -> dict[str, Any]:
    if not spec.expert_layers:
        return {}
    layers = [int(i in spec.expert_layers) for i in range(spec.num_layers)]
    return {
        "num_moe_experts": spec.experts,
        "moe_router_topk": spec.experts_per_token,
        "moe_ffn_hidden_size": spec.expert_ffn_hidden_size,
        "moe_layer_freq": 1 if spec.uniform_layers else layers,
        # softmax over the chosen experts' scores alone is softmax over all, made to sum to 1
        "moe_router_pre_softmax": not spec.normalise_expert_weights,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": False,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": expert_tensor,
    }


def build_model(
    spec: ModelSpec,
    tcfg: TransformerConfig,
    *,
    vocab_pad_multiple: int = 128,
    pre_process: bool | None = None,
    post_process: bool | None = None,
    vp_stage: int | None = None,
    adapters: Adapters | None = None,
) -> GPTModel:
    """The GPTModel of this rank, on device(), in tcfg.params_dtype; weights are random.

    Logits stay split over tensor-parallel ranks: forward(tokens [b, s], position_ids, None) gives
    [b, s, padded_vocab / tensor]. Columns from spec.vocab_size on are padding: never count them.

    Args:
        spec: the architecture.
        tcfg: from transformer_config(spec, ...).
        vocab_pad_multiple: see padded_vocab.
        pre_process, post_process: whether to hold the embedding and the output layer; by default
            the first and the last pipeline stage do.
        vp_stage: which of this stage's model chunks, with a virtual pipeline.
        adapters: of its linear layers (models/lora.py), which then are all that is trained.
    """
    if pre_process is None:
        pre_process = parallel_state.is_pipeline_first_stage(
            ignore_virtual=False, vp_stage=vp_stage
        )
    if post_process is None:
        post_process = parallel_state.is_pipeline_last_stage(
            ignore_virtual=False, vp_stage=vp_stage
        )
    model = GPTModel(
        config=tcfg,
        transformer_layer_spec=block_spec(tcfg, spec, vp_stage, adapters),
        vocab_size=padded_vocab(
            spec.vocab_size, vocab_pad_multiple, tcfg.tensor_model_parallel_size
        ),
        max_sequence_length=spec.context_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=spec.tied_embeddings,
        position_embedding_type="rope",
        rotary_percent=spec.rotary_fraction,
        rotary_base=spec.rope_theta,
        mtp_block_spec=head_spec(tcfg, spec, vp_stage) if post_process else None,
        vp_stage=vp_stage,
    )
    if tcfg.expert_tensor_parallel_size != tcfg.tensor_model_parallel_size:
        # megatron-core leaves experts that every rank has to the reduction of the dense weights,
        # which does not reach the tensor ranks: whole experts there see some of the tokens each.
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.allreduce = False  # type: ignore[attr-defined]
    # A plain attribute, not a buffer: neither .to(bfloat16) nor a checkpoint touches it.
    model.rotary_pos_emb.inv_freq = inverse_frequencies(spec).to(device())
    if model.mtp_process and spec.tied_embeddings and not pre_process:
        # megatron-core gives it one, never uses it, and would not find a place to save it
        model.output_layer.register_parameter("weight", None)
    # heads bring a copy of the embedding to the last stage
    if (pre_process or model.mtp_process) and spec.embedding_scale != 1:
        model.embedding.register_forward_hook(_Scale(spec.embedding_scale))
    if post_process and spec.logits_softcap is not None:
        # here: conversion builds models too, and has no use for the loss and its kernels
        from megatron_deft.loss.output_layer import Softcap

        model.output_layer.register_forward_hook(Softcap(spec.logits_softcap))
    return model


@dataclass(frozen=True)
class _Scale:
    """Forward hook: the output times a factor, which is rounded to its dtype as in transformers."""

    factor: float

    def __call__(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.tensor(self.factor, dtype=output.dtype, device=output.device)
