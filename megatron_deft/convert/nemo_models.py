"""What a NeMo 2 model class means as a Hugging Face config.json, and the other way round.

A table per class. Reading goes to a config.json and not straight to a ModelSpec: the weights folder
needs the file anyway, and the checks of models/families then hold for NeMo models too. Writing is
proven by reading: what does not come back equal cannot be held by NeMo and is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import isclose
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec, spec_from_hf

Config = Mapping[str, Any]  # of NeMo: the "config" of context/model.yaml

# NeMo config key -> its legal values, the first of them what an absent key means. Every switch that
# changes what the model computes and that config.json has no word for.
LEGAL: Mapping[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "layernorm_zero_centered_gamma": (False,),
    "activation_func": ("torch.nn.functional.silu",),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "gated_linear_unit": (True,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "seq_len_interpolation_factor": (None,),
    "scale_factor": (None,),
    "no_rope_freq": (None,),
    "mrope_section": (None,),
    "window_size": (None,),
    "window_attn_skip_freq": (None,),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "attention_output_gate": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "heterogeneous_block_specs": (False,),
    "is_hybrid_model": (False,),
    "mtp_num_layers": (None,),
    "num_moe_experts": (None,),
    "moe_layer_freq": (1,),
    "moe_router_score_function": ("softmax",),
    "moe_router_pre_softmax": (False,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_num_groups": (None,),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_expert_capacity_factor": (None,),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "fp8_param": (False,),
    "fp4_param": (False,),
}
ANY: tuple[Any, ...] = ()  # in `legal` of a model: its config.json has a word for it

COMMON: Mapping[str, str] = {  # config.json key <- NeMo key
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "initializer_range": "init_method_std",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
    "vocab_size": "vocab_size",
}
LLAMA3 = {  # rope_scaling key <- field of NeMo's Llama31Config
    "factor": "scale_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "old_context_len",
}


@dataclass(frozen=True)
class NemoModel:
    """One model class of nemo.collections.llm.

    legal:     config keys that differ from LEGAL; ANY where `to_hf` reads them
    model_type, to_hf:  of the config.json, the latter what COMMON lacks
    config:    the config class that export names
    from_spec: its arguments, what COMMON lacks
    own_head:  NeMo's own connectors know this class with a separate head only
    """

    name: str
    model_type: Callable[[Config], str]
    config: Callable[[ModelSpec], str]
    legal: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    to_hf: Callable[[Config], dict[str, Any]] = lambda config: {}
    from_spec: Callable[[ModelSpec], dict[str, Any]] = lambda spec: {}
    own_head: bool = False


def _llama_to_hf(config: Config) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if config.get("scale_factor") is not None:
        scaling = {"rope_type": "llama3"} | {hf: config.get(key) for hf, key in LLAMA3.items()}
    if (factor := config.get("seq_len_interpolation_factor")) is not None:
        if scaling:
            raise UserError(
                "context/model.yaml: scale_factor and seq_len_interpolation_factor are both set, "
                "config.json can hold one of them: NeMo's own exporter writes the model"
            )
        scaling = {"rope_type": "linear", "factor": float(factor)}
    bias = bool(config.get("add_bias_linear"))
    return {"rope_scaling": scaling, "attention_bias": bias, "mlp_bias": bias}


def _llama_from_spec(spec: ModelSpec) -> dict[str, Any]:
    scaling = spec.rope_scaling or {}
    found: dict[str, Any] = {"add_bias_linear": spec.mlp_bias}
    if scaling.get("rope_type") == "llama3":
        found |= {key: scaling[hf] for hf, key in LLAMA3.items()}
    if scaling.get("rope_type") == "linear":
        found["seq_len_interpolation_factor"] = scaling["factor"]
    return found


def _window_to_hf(config: Config) -> dict[str, Any]:
    """NeMo's connectors take window_size [W, 0] for sliding_window W, and so does this.

    Megatron's W counts the tokens before the one that attends, so NeMo looks one token further than
    transformers does with the same weights.
    """
    window = config.get("window_size")
    if window is not None and (len(window) != 2 or window[1] not in (0, -1)):
        raise UserError(
            f"context/model.yaml: window_size {window} is not supported: legal are null and [W, 0]"
        )
    return {"sliding_window": None if window is None or window[0] < 0 else window[0]}


def _window_from_spec(spec: ModelSpec) -> dict[str, Any]:
    return {"window_size": None if spec.window is None else [spec.window, 0]}


def _qwen3_to_hf(config: Config) -> dict[str, Any]:
    if config.get("num_moe_experts") is None:
        return {}
    return {
        "num_experts": config["num_moe_experts"],
        "num_experts_per_tok": config.get("moe_router_topk"),
        "moe_intermediate_size": config.get("moe_ffn_hidden_size") or config["ffn_hidden_size"],
        # softmax over the chosen experts, or over all before they are chosen
        "norm_topk_prob": not config.get("moe_router_pre_softmax"),
    }


def _qwen3_from_spec(spec: ModelSpec) -> dict[str, Any]:
    found: dict[str, Any] = {"max_position_embeddings": spec.max_position_embeddings}
    if spec.experts:
        found |= {
            "num_moe_experts": spec.experts,
            "moe_router_topk": spec.experts_per_token,
            "moe_ffn_hidden_size": spec.expert_ffn_hidden_size,
            "moe_router_pre_softmax": not spec.normalise_expert_weights,
        }
    return found


def _mixtral_to_hf(config: Config) -> dict[str, Any]:
    return {
        "num_local_experts": config.get("num_moe_experts"),
        "num_experts_per_tok": config.get("moe_router_topk"),
        "intermediate_size": config.get("moe_ffn_hidden_size") or config["ffn_hidden_size"],
    }


def _mixtral_from_spec(spec: ModelSpec) -> dict[str, Any]:
    return {
        "max_position_embeddings": spec.max_position_embeddings,
        "num_moe_experts": spec.experts,
        "moe_router_topk": spec.experts_per_token,
    }


def _gemma2_to_hf(config: Config) -> dict[str, Any]:
    """NeMo gives the window to the 2nd, 4th... layer, transformers to the 1st, 3rd...

    As NeMo's connectors do, the difference is left to the two: weights are the same.
    """
    return {
        "query_pre_attn_scalar": config.get("query_pre_attn_scalar"),
        "attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "final_logit_softcapping": config.get("final_logit_softcapping"),
        **_window_to_hf(config),
    }


def _gemma2_from_spec(spec: ModelSpec) -> dict[str, Any]:
    assert spec.attention_scale is not None, spec
    scalar = spec.attention_scale**-2
    whole = isclose(scalar, round(scalar), rel_tol=1e-12)
    return {
        "query_pre_attn_scalar": round(scalar) if whole else scalar,
        "attn_logit_softcapping": spec.attention_softcap,
        "final_logit_softcapping": spec.logits_softcap,
        **_window_from_spec(spec),
    }


def _is(name: str) -> Callable[[Any], str]:
    return lambda _: name


MODELS: Mapping[str, NemoModel] = {
    model.name: model
    for model in (
        NemoModel(
            "LlamaModel",
            _is("llama"),
            lambda spec: (
                "Llama31Config"
                if (spec.rope_scaling or {}).get("rope_type") == "llama3"
                else "LlamaConfig"
            ),
            {"scale_factor": ANY, "seq_len_interpolation_factor": ANY, "add_bias_linear": ANY},
            _llama_to_hf,
            _llama_from_spec,
        ),
        NemoModel(
            "MistralModel",
            _is("mistral"),
            _is("MistralConfig7B"),
            {"window_size": ANY},
            _window_to_hf,
            _window_from_spec,
        ),
        NemoModel(
            "Qwen2Model",
            _is("qwen2"),
            _is("Qwen2Config"),
            {"add_qkv_bias": (True,)},
            own_head=True,
        ),
        NemoModel(
            "Qwen3Model",
            lambda config: "qwen3" if config.get("num_moe_experts") is None else "qwen3_moe",
            lambda spec: "Qwen3MoEConfig" if spec.experts else "Qwen3Config",
            {"qk_layernorm": (True,), "num_moe_experts": ANY, "moe_router_pre_softmax": ANY},
            _qwen3_to_hf,
            _qwen3_from_spec,
        ),
        NemoModel(
            "MixtralModel",
            _is("mixtral"),
            _is("MixtralConfig"),
            {"num_moe_experts": ANY},
            _mixtral_to_hf,
            _mixtral_from_spec,
        ),
        NemoModel(
            "Gemma2Model",
            _is("gemma2"),
            _is("Gemma2Config"),
            {
                "layernorm_zero_centered_gamma": (True,),
                "activation_func": ("nemo.collections.llm.fn.activation.openai_gelu",),
                "window_size": ANY,
            },
            _gemma2_to_hf,
            _gemma2_from_spec,
        ),
    )
}
NEMO_CLASSES = {  # our family -> NeMo's class
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "qwen3_moe": "Qwen3Model",
    "mixtral": "MixtralModel",
    "gemma2": "Gemma2Model",
}


def hf_config(name: str, config: Config, tokens: int | None = None) -> dict[str, Any]:
    """The config.json of a NeMo model of class `name`.

    tokens: of its tokenizer; what NeMo takes when the config names no vocab_size
    Errors: UserError naming the class or the setting that our families cannot express.
    """
    if name not in MODELS:
        raise UserError(
            f"NeMo model class {name} is not supported: legal are {', '.join(sorted(MODELS))}; "
            "others go through NeMo's own `nemo llm export` and `convert import` of its result"
        )
    model = MODELS[name]
    for key, legal in {**LEGAL, **model.legal}.items():
        if legal and config.get(key, legal[0]) not in legal:
            raise UserError(
                f"context/model.yaml: {key} {config[key]!r} is not supported for {name}: only "
                f"{' or '.join(map(repr, legal))}"
            )
    found = {hf: config[key] for hf, key in COMMON.items() if config.get(key) is not None}
    found.setdefault("vocab_size", tokens)
    positions = config.get("max_position_embeddings") or config.get("seq_length")
    if positions is not None:
        found["max_position_embeddings"] = positions
    return {"model_type": model.model_type(config), **found, **model.to_hf(config)}


def nemo_config(spec: ModelSpec) -> tuple[NemoModel, str, dict[str, Any]]:
    """The NeMo class, its config class and the arguments of that class for a model.

    Errors: UserError for a family NeMo has no class for, or settings its class cannot hold.
    """
    if spec.family not in NEMO_CLASSES:
        raise UserError(
            f"NeMo 2 has no class for the family {spec.family!r}: legal are "
            f"{', '.join(NEMO_CLASSES)}; `--format hf` writes every family"
        )
    model = MODELS[NEMO_CLASSES[spec.family]]
    if model.own_head:
        spec = replace(spec, tied_embeddings=False)
    arguments: dict[str, Any] = {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": spec.expert_ffn_hidden_size
        if spec.family == "mixtral"
        else spec.ffn_hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "num_query_groups": spec.num_query_groups,
        "kv_channels": spec.head_dim,
        "layernorm_epsilon": spec.rms_norm_eps,
        "rotary_base": spec.rope_theta,
        "init_method_std": spec.initializer_range,
        "share_embeddings_and_output_weights": spec.tied_embeddings,
        "vocab_size": spec.vocab_size,
        "seq_length": spec.max_position_embeddings,
        **model.from_spec(spec),
    }
    implied = {key: legal[0] for key, legal in model.legal.items() if legal}
    back = spec_from_hf(hf_config(model.name, {**implied, **arguments})).to_json()
    lost = sorted(key for key, value in spec.to_json().items() if not _same(back[key], value))
    if lost:
        raise UserError(
            f"NeMo's {model.name} cannot hold {', '.join(lost)} of this {spec.family} model: "
            "`--format hf` writes it whole"
        )
    return model, model.config(spec), arguments


def _same(a: Any, b: Any) -> bool:
    """Equal but for the last bits of a float that was computed there and back."""
    return isclose(a, b, rel_tol=1e-12) if isinstance(a, float) and b is not None else a == b
