"""A tiny Llama as a whole Hugging Face folder: config, tokenizer with a chat template, weights.

For tests and for the quickstart: it needs no download, and every tool that reads a Llama reads it.
Nothing is learnt yet; the weights are random.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.files import atomic_folder

BOS, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # BOS is the padding token too
_SPECIALS = (BOS, START, END)  # their ids are 0, 1, 2
_BYTES = 256  # every byte is a token, so that any text can be spelled

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_llama(
    out: str | Path,
    texts: Iterable[str],
    *,
    vocab_size: int = 512,
    embeddings: int | None = None,
    split: str | None = None,
    hidden_size: int = 64,
    ffn_hidden_size: int | None = None,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    max_positions: int = 4096,
    tied_embeddings: bool = False,
    seed: int = 1234,
    overwrite: bool = False,
) -> Path:
    """Write the folder `out` and return it; transformers 4.57 and 5 load it, in fp32.

    The tokenizer is byte-level BPE trained on `texts`: decode(encode(x)) == x for every string, and
    special tokens aside no string is out of vocabulary. `vocab_size` is an upper bound: texts that
    hold fewer merges give fewer tokens; `embeddings` are the model's rows for them, at least as
    many, and as many unless given. `split` is a regular expression (Oniguruma) whose matches
    stand alone: no token reaches from one into the text around it; by default words are told apart
    as GPT-2 does. The same arguments give the same bytes in every file.
    `ffn_hidden_size` is 4 * hidden_size unless given.

    Errors: UserError when sizes do not divide, `split` is no regular expression, or `out` exists
    and `overwrite` is false.
    """
    sizes = {"hidden_size": hidden_size, "layers": layers, "heads": heads, "kv_heads": kv_heads}
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name}={size}: at least 1 is needed")
    _check(vocab_size, hidden_size, heads, kv_heads)
    tokenizer = _train_tokenizer(texts, vocab_size, split)
    tokens = tokenizer.get_vocab_size()
    if embeddings is not None and embeddings < tokens:
        raise UserError(f"embeddings={embeddings}: the tokenizer has {tokens} tokens")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": embeddings or tokens,
        "hidden_size": hidden_size,
        "intermediate_size": ffn_hidden_size or 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden_size // heads,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        # transformers 4 reads rope_theta alone and 5 reads rope_parameters: each needs its own
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": tied_embeddings,
        "bos_token_id": _SPECIALS.index(BOS),
        "eos_token_id": _SPECIALS.index(END),
        "pad_token_id": _SPECIALS.index(BOS),
        "torch_dtype": "float32",
        "use_cache": True,
    }
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with atomic_folder(out, overwrite) as folder:
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", generation)
        tokenizer.save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(max_positions))
        _write_weights(folder / "model.safetensors", config, seed)
    return Path(out)


def _check(vocab_size: int, hidden_size: int, heads: int, kv_heads: int) -> None:
    smallest = _BYTES + len(_SPECIALS)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size={vocab_size}: at least {smallest}, every byte and each special"
        )
    if hidden_size % heads or (hidden_size // heads) % 2:
        raise UserError(f"hidden_size={hidden_size}: an even multiple of heads={heads} is needed")
    if heads % kv_heads:
        raise UserError(f"kv_heads={kv_heads}: must divide heads={heads}")


def _train_tokenizer(texts: Iterable[str], vocab_size: int, split: str | None) -> Any:
    """Byte-level BPE with no prefix space and no normaliser: every byte of a text is kept."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    parts: list[Any] = [] if split is None else [_split(split)]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _split(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    try:
        return pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"split={pattern}: not a regular expression ({error})") from None


def _tokenizer_config(max_positions: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": BOS,
        "additional_special_tokens": [START],
        "clean_up_tokenization_spaces": False,  # it would drop the space before . and ,
        "model_max_length": max_positions,
        "chat_template": CHAT_TEMPLATE,
    }


def _write_weights(path: Path, config: dict[str, Any], seed: int) -> None:
    """Weights as transformers initialises them: normal with initializer_range, norms of one."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**config))
    weights = dict(model.state_dict())
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]  # one tensor, stored once
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable by its owner alone


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
