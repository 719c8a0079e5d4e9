"""Rows that families share: Llama's names, which most have kept."""

from operator import attrgetter

from megatron_deft.models.families.table import Row, expert_layers, mlp_layers

L, M = "model.layers.{i}.", "decoder.layers.{i}."
EXPERT = M + "mlp.experts.local_experts.{e}."


def untied(spec: object) -> bool:
    """Whether the head has a matrix of its own."""
    return not attrgetter("tied_embeddings")(spec)


EMBEDDING = Row(
    "embedding.word_embeddings.weight", (("model.embed_tokens.weight", "v h"),), shard="vocab"
)
FINAL = (
    Row("decoder.final_layernorm.weight", (("model.norm.weight", "h"),)),
    Row("output_layer.weight", (("lm_head.weight", "v h"),), shard="vocab", when=untied),
)
INPUT_NORM = Row(M + "input_layernorm.weight", ((L + "input_layernorm.weight", "h"),))
QKV = Row(
    M + "self_attention.linear_qkv.weight",
    (
        (L + "self_attn.q_proj.weight", "q h"),
        (L + "self_attn.k_proj.weight", "k h"),
        (L + "self_attn.v_proj.weight", "k h"),
    ),
    "qkv",
    "rows",
)
QKV_BIAS = Row(
    M + "self_attention.linear_qkv.bias",
    (
        (L + "self_attn.q_proj.bias", "q"),
        (L + "self_attn.k_proj.bias", "k"),
        (L + "self_attn.v_proj.bias", "k"),
    ),
    "qkv",
    "rows",
    attrgetter("qkv_bias"),
)
PACKED_QKV = Row(
    M + "self_attention.linear_qkv.weight",
    ((L + "self_attn.qkv_proj.weight", "qkk h"),),
    "packed_qkv",
    "rows",
)
QK_NORMS = (
    Row(M + "self_attention.q_layernorm.weight", ((L + "self_attn.q_norm.weight", "d"),)),
    Row(M + "self_attention.k_layernorm.weight", ((L + "self_attn.k_norm.weight", "d"),)),
)
ATTENTION_OUT = (
    Row(
        M + "self_attention.linear_proj.weight",
        ((L + "self_attn.o_proj.weight", "h q"),),
        shard="columns",
    ),
    Row(
        M + "self_attention.linear_proj.bias",
        ((L + "self_attn.o_proj.bias", "h"),),
        when=attrgetter("attention_out_bias"),
    ),
)
PRE_MLP_NORM = Row(M + "pre_mlp_layernorm.weight", ((L + "post_attention_layernorm.weight", "h"),))
MLP_UP = Row(
    M + "mlp.linear_fc1.weight",
    ((L + "mlp.gate_proj.weight", "f h"), (L + "mlp.up_proj.weight", "f h")),
    "gate_up",
    "halves",
    layers=mlp_layers,
)
MLP_UP_BIAS = Row(
    M + "mlp.linear_fc1.bias",
    ((L + "mlp.gate_proj.bias", "f"), (L + "mlp.up_proj.bias", "f")),
    "gate_up",
    "halves",
    attrgetter("mlp_bias"),
)
# Gate above up in one tensor is Megatron's own order.
PACKED_MLP_UP = Row(
    M + "mlp.linear_fc1.weight", ((L + "mlp.gate_up_proj.weight", "2f h"),), shard="halves"
)
MLP_DOWN = Row(
    M + "mlp.linear_fc2.weight",
    ((L + "mlp.down_proj.weight", "h f"),),
    shard="columns",
    layers=mlp_layers,
)
MLP_DOWN_BIAS = Row(
    M + "mlp.linear_fc2.bias", ((L + "mlp.down_proj.bias", "h"),), when=attrgetter("mlp_bias")
)
ATTENTION = (INPUT_NORM, QKV, QKV_BIAS, *ATTENTION_OUT)
MLP = (MLP_UP, MLP_UP_BIAS, MLP_DOWN, MLP_DOWN_BIAS)
LLAMA = (EMBEDDING, *ATTENTION, PRE_MLP_NORM, *MLP, *FINAL)


def post_norms(attention: str, mlp: str) -> tuple[Row, Row]:
    """Norms of what attention and MLP put out, under the names that a family gives them."""
    return (
        Row(M + "self_attention.linear_proj.post_norm.weight", ((f"{L}{attention}.weight", "h"),)),
        Row(M + "mlp.linear_fc2.post_norm.weight", ((f"{L}{mlp}.weight", "h"),)),
    )


def experts(router: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A layer of experts, under the names that a family gives its tensors."""
    return (
        Row(M + "mlp.router.weight", ((f"{L}{router}.weight", "e h"),), layers=expert_layers),
        Row(
            EXPERT + "linear_fc1.weight",
            ((f"{L}{gate}.weight", "m h"), (f"{L}{up}.weight", "m h")),
            "gate_up",
            "halves",
            layers=expert_layers,
        ),
        Row(
            EXPERT + "linear_fc2.weight",
            ((f"{L}{down}.weight", "h m"),),
            shard="columns",
            layers=expert_layers,
        ),
    )
