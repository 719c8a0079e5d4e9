"""Llama 2, 3, 3.1 and 3.2, and what shares its architecture (DeepSeek-Math 7B)."""

from megatron_deft.models.families.rows import LLAMA
from megatron_deft.models.families.table import Family
from megatron_deft.models.families.values import switch

FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    LLAMA,
    fields={
        "qkv_bias": switch("attention_bias"),
        "attention_out_bias": switch("attention_bias"),
        "mlp_bias": switch("mlp_bias"),
    },
)
