"""Mixtral 8x7B and 8x22B."""

from megatron_deft.models.families import rope
from megatron_deft.models.families.reading import window_in_every_layer
from megatron_deft.models.families.rows import ATTENTION, EMBEDDING, FINAL, PRE_MLP_NORM, experts
from megatron_deft.models.families.table import Family
from megatron_deft.models.families.values import layers, optional, positive, whole

FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    (
        EMBEDDING,
        *ATTENTION,
        PRE_MLP_NORM,
        *experts(
            router="block_sparse_moe.gate",
            gate="block_sparse_moe.experts.{e}.w1",
            up="block_sparse_moe.experts.{e}.w3",
            down="block_sparse_moe.experts.{e}.w2",
        ),
        *FINAL,
    ),
    fields={
        "rope_theta": lambda config: rope.theta(config, 1000000.0),
        "experts": positive("num_local_experts"),
        "experts_per_token": positive("num_experts_per_tok"),
        "expert_ffn_hidden_size": positive("intermediate_size"),
        "expert_layers": lambda config: tuple(range(layers(config))),
        "window": optional("sliding_window", whole),
        "window_layers": window_in_every_layer,
    },
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "intermediate_size": 14336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "router_jitter_noise": 0.0,
    },
    refusals=(("router_jitter_noise", lambda noise: not noise, "0"),),
)
