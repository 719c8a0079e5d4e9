"""What one transformers writes and reads of every tiny model, for another to compare with.

    python -m tests.transformers4.exchange write FOLDER   make, import, export, and say what is read
    python -m tests.transformers4.exchange read FOLDER    import and export what the other made

FOLDER/CASE/source is what save_pretrained writes, FOLDER/CASE/exported what comes back from
Megatron, beside FOLDER/CASE/NAME.json and .safetensors: how this transformers reads it.
"""

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, __version__

from megatron_deft.convert.hf import export_hf, import_hf
from megatron_deft.data.tiny import make_tiny_llama
from megatron_deft.data.tokenizer import template_hash, template_text, tokenizer_hash
from tests.convert.tiny_models import CONFIGS, make

VOCABULARY = 300
LENGTH = 48
TEXT = "Ein naïve test: 水は 12 + 345 = 357,\n\n  <|im_start|>it's DON'T\tok<|im_end|> </s> e\u0301"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12 + 345?"},
    {"role": "assistant", "content": "It's 357."},
]
# Qwen's own way to split a text: transformers 5 uses it for a Qwen folder whatever its files say,
# and so it does with NFC.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RARELY_WRITTEN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # yarn's, what absence means
SIZES = (
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "sliding_window",
    "layer_types", "num_experts_per_tok", "norm_topk_prob", "mlp_only_layers",
    "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
)  # fmt: skip


def add_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def write_source(folder: Path, case: str) -> Path:
    """A random model with tokenizer and chat template, all written by save_pretrained."""
    config = deepcopy(CONFIGS[case])
    config.vocab_size = VOCABULARY
    qwen = config.model_type.startswith("qwen")
    parts = make_tiny_llama(
        folder / "parts",
        [TEXT] * 3,
        vocab_size=VOCABULARY,
        split=QWEN_SPLIT if qwen else None,
        hidden_size=8,
        layers=1,
        heads=1,
        kv_heads=1,
    )
    (parts / "config.json").write_text(json.dumps({"model_type": config.model_type}))
    if qwen:
        add_json(parts / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
        add_json(parts / "tokenizer.json", normalizer={"type": "NFC"})
    source = make(folder / "source", config)
    AutoTokenizer.from_pretrained(parts).save_pretrained(source)
    return source


def facts(folder: Path) -> dict[str, Any]:
    """What this transformers reads from the folder's JSON files."""
    config = AutoConfig.from_pretrained(folder)
    place = "rope_scaling" if __version__.startswith("4.") else "rope_parameters"
    rope = {"rope_type": "default", **RARELY_WRITTEN, **(getattr(config, place, None) or {})}
    for key, default in (("rope_theta", None), ("partial_rotary_factor", 1.0)):
        rope.setdefault(key, getattr(config, key, default))
    experts = (getattr(config, key, None) for key in ("num_experts", "num_local_experts"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    specials = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return {
        **{key: getattr(config, key, None) for key in SIZES},
        "head_dim": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        "experts": next((n for n in experts if n is not None), None),
        "rope": dict(sorted(rope.items())),
        "dtype": str(config.dtype).removeprefix("torch."),
        "ids": tokenizer(TEXT)["input_ids"],
        "chat": chat,
        "chat_ids": tokenizer(chat, add_special_tokens=False)["input_ids"],
        "special_tokens": {key: specials[key] for key in ("bos_token", "eos_token", "pad_token")},
        "all_special_ids": sorted(tokenizer.all_special_ids),
        "decoded": tokenizer.decode(tokenizer(TEXT)["input_ids"]),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "template_hash": template_hash(template_text(tokenizer)),
    }


def computed(folder: Path) -> dict[str, Tensor]:
    """Logits in fp32, up to the last position the model allows, and the rotary frequencies."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.arange(2 * LENGTH).mul(7).remainder(VOCABULARY).reshape(2, LENGTH)
    last = model.config.max_position_embeddings - 1
    far = torch.linspace(LENGTH // 2, last, LENGTH // 2).round().long()
    positions = torch.cat([torch.arange(LENGTH // 2), far]).expand(2, -1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return {"logits": logits, "frequencies": model.get_decoder().rotary_emb.inv_freq.clone()}


def record(folder: Path) -> None:
    """Write what this transformers reads beside the folder."""
    folder.with_suffix(".json").write_text(json.dumps(facts(folder)))
    save_file(computed(folder), folder.with_suffix(".safetensors"))


def recorded(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What record() wrote."""
    said: dict[str, Any] = json.loads(folder.with_suffix(".json").read_text())
    return said, load_file(folder.with_suffix(".safetensors"))


def through_megatron(source: Path) -> Path:
    """Import with verification, and export."""
    weights = import_hf(source, source.with_name("weights"))
    return export_hf(weights, source.with_name("exported"), verify=False)


def main(what: str, root: str) -> None:
    """See the head of this file."""
    for case in CONFIGS:
        folder = Path(root, case)
        if what == "write":
            record(write_source(folder, case))
        record(through_megatron(folder / "source"))


if __name__ == "__main__":
    main(*sys.argv[1:])
