"""ModelSpec -> TransformerConfig -> GPTModel."""

import math

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_deft.models.families import ModelSpec
from megatron_deft.models.spec import block_spec, has_transformer_engine
from megatron_deft.platform import device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

RECOMPUTE: dict[str, dict[str, object]] = {
    "none": {},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def padded_vocab(vocab_size: int, multiple: int, tensor: int) -> int:
    """Megatron's vocabulary size: the next multiple of `multiple * tensor` from `vocab_size` on."""
    return math.ceil(vocab_size / (multiple * tensor)) * multiple * tensor


def transformer_config(
    spec: ModelSpec,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    sequence: bool = False,
    dtype: str = "fp32",
    recompute: str = "none",
    attention_dropout: float = 0.0,
    hidden_dropout: float = 0.0,
    calculate_per_token_loss: bool = False,
    perform_initialization: bool = True,
) -> TransformerConfig:
    """megatron-core's config of a model and its layout.

    Args:
        spec: the architecture.
        tensor, pipeline, context: parallel sizes.
        sequence: split norms and dropout along the sequence; only has effect with tensor > 1, and
            then every batch's length must be a multiple of tensor.
        dtype: "fp32" or "bf16", of parameters, activations and what pipeline stages send.
        recompute: "none", or "full" to keep only each layer's input for the backward pass.
        attention_dropout, hidden_dropout: probabilities in training mode.
        calculate_per_token_loss: the loss function returns (sum, number of tokens), and gradients
            are divided by the number over all micro-batches and data-parallel ranks.
        perform_initialization: false leaves the weights undefined, for a model about to be loaded.
            Not with tensor > 1: megatron-core marks a weight as split while it initialises it, and
            without that mark gradient norms count one rank's part.
    """
    assert perform_initialization or tensor == 1
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
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,  # attention_out_bias and mlp_bias are in the layer spec
        add_qkv_bias=spec.qkv_bias,
        init_method_std=spec.initializer_range,
        perform_initialization=perform_initialization,
        attention_dropout=attention_dropout,
        hidden_dropout=hidden_dropout,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        sequence_parallel=sequence and tensor > 1,
        bf16=dtype == "bf16",
        params_dtype=DTYPES[dtype],
        pipeline_dtype=DTYPES[dtype],
        # Micro-batches are as long as their longest sample, so stages tell each other the shape.
        variable_seq_lengths=pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # what the check of the line above insists on
        cuda_graph_scope=[],  # the default is deprecated and says so for every config
        # A stage's output has been sent on; only its graph is needed for the backward pass.
        deallocate_pipeline_outputs=pipeline > 1,
        calculate_per_token_loss=calculate_per_token_loss,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **RECOMPUTE[recompute],
    )


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """The rotary angle per position of each pair of head dimensions, as transformers computes it.

    The operations and their order are transformers' (modeling_rope_utils.py), so the result is the
    same to the last bit. megatron-core's own llama3 scaling fixes low_freq_factor, high_freq_factor
    and the original length at Llama 3.1's values.

    Returns: [head_dim / 2] float32 on the CPU, radians.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).to(torch.float) / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    assert scaling["rope_type"] == "llama3", scaling

    # Slow pairs (a turn longer than the original context) are slowed by `factor`, fast ones kept,
    # those between interpolated.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original_length = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    scaled = torch.where(wavelength > original_length / low, frequencies / factor, frequencies)
    smooth = (original_length / wavelength - low) / (high - low)
    interpolated = (1 - smooth) * scaled / factor + smooth * scaled
    is_between = ~(wavelength < original_length / high) * ~(wavelength > original_length / low)
    return torch.where(is_between, interpolated, scaled)


def build_model(
    spec: ModelSpec,
    tcfg: TransformerConfig,
    *,
    vocab_pad_multiple: int = 128,
    pre_process: bool | None = None,
    post_process: bool | None = None,
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
    """
    if pre_process is None:
        pre_process = parallel_state.is_pipeline_first_stage()
    if post_process is None:
        post_process = parallel_state.is_pipeline_last_stage()
    model = GPTModel(
        config=tcfg,
        transformer_layer_spec=block_spec(
            tcfg, attention_out_bias=spec.attention_out_bias, mlp_bias=spec.mlp_bias
        ),
        vocab_size=padded_vocab(
            spec.vocab_size, vocab_pad_multiple, tcfg.tensor_model_parallel_size
        ),
        max_sequence_length=spec.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=spec.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=spec.rope_theta,
    )
    # A plain attribute, not a buffer: neither .to(bfloat16) nor a checkpoint touches it.
    model.rotary_pos_emb.inv_freq = inverse_frequencies(spec).to(device())
    return model
