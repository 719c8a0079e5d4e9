"""Copies transformers' weights into a GPTModel of one rank: the oracle of test_build.py."""

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import PreTrainedModel

from megatron_deft.models.families import ModelSpec


def interleave_qkv(spec: ModelSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Megatron's rows: for each group its query heads, then its key, then its value."""
    q, k, v = (t.unflatten(0, (spec.num_query_groups, -1)) for t in (q, k, v))
    return torch.cat([q, k, v], dim=1).flatten(0, 1)


@torch.no_grad()
def copy_weights(spec: ModelSpec, hf: PreTrainedModel, gpt: GPTModel) -> None:
    """Every parameter of `gpt` from `hf`; what either has and the other lacks raises KeyError."""
    source = dict(hf.state_dict())
    if spec.tied_embeddings:
        source.pop("lm_head.weight", None)
    target = dict(gpt.named_parameters())

    def put(name: str, value: Tensor) -> None:
        destination = target.pop(name)
        destination.zero_()
        destination[: value.size(0)].copy_(value)

    put("embedding.word_embeddings.weight", source.pop("model.embed_tokens.weight"))
    put("decoder.final_layernorm.weight", source.pop("model.norm.weight"))
    if not spec.tied_embeddings:
        put("output_layer.weight", source.pop("lm_head.weight"))
    for layer in range(spec.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        put(f"{ours}input_layernorm.weight", source.pop(f"{theirs}input_layernorm.weight"))
        put(
            f"{ours}pre_mlp_layernorm.weight",
            source.pop(f"{theirs}post_attention_layernorm.weight"),
        )
        for kind, has_qkv, has_out, has_mlp in (
            ("weight", True, True, True),
            ("bias", spec.qkv_bias, spec.attention_out_bias, spec.mlp_bias),
        ):
            if has_qkv:
                qkv = (source.pop(f"{theirs}self_attn.{n}_proj.{kind}") for n in "qkv")
                put(f"{ours}self_attention.linear_qkv.{kind}", interleave_qkv(spec, *qkv))
            if has_out:
                out = source.pop(f"{theirs}self_attn.o_proj.{kind}")
                put(f"{ours}self_attention.linear_proj.{kind}", out)
            if has_mlp:
                gate_up = [source.pop(f"{theirs}mlp.{n}_proj.{kind}") for n in ("gate", "up")]
                put(f"{ours}mlp.linear_fc1.{kind}", torch.cat(gate_up))
                put(f"{ours}mlp.linear_fc2.{kind}", source.pop(f"{theirs}mlp.down_proj.{kind}"))
    if source or target:
        raise KeyError(f"left over: {sorted(source)} of transformers, {sorted(target)} of megatron")
