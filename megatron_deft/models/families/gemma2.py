"""Gemma 2: four norms of 1 + weight in a layer, capped scores and logits, a window in every other
layer, embeddings scaled by sqrt(hidden_size)."""

from megatron_deft.models.families import rope
from megatron_deft.models.families.reading import activation, window_by_layer_types
from megatron_deft.models.families.rows import ATTENTION, EMBEDDING, FINAL, MLP, L, M, post_norms
from megatron_deft.models.families.table import Family, Row
from megatron_deft.models.families.values import optional, real, switch, whole

FAMILY = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    (
        EMBEDDING,
        *ATTENTION,
        Row(M + "pre_mlp_layernorm.weight", ((L + "pre_feedforward_layernorm.weight", "h"),)),
        *MLP,
        *post_norms("post_attention_layernorm", "post_feedforward_layernorm"),
        *FINAL,
    ),
    fields={
        "qkv_bias": switch("attention_bias"),
        "attention_out_bias": switch("attention_bias"),
        "activation": activation("hidden_activation"),
        "rope_scaling": rope.unscaled,  # the class knows no other
        "post_norms": True,
        "norm_plus_one": True,
        "embedding_scale": lambda config: whole(config, "hidden_size") ** 0.5,
        "attention_scale": lambda config: real(config, "query_pre_attn_scalar") ** -0.5,
        "attention_softcap": optional("attn_logit_softcapping", real),
        "logits_softcap": optional("final_logit_softcapping", real),
        "window": optional("sliding_window", whole),
        "window_layers": window_by_layer_types(lambda config, layer: layer % 2 == 0),
    },
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    refusals=(("use_bidirectional_attention", lambda used: not used, "false"),),
)
