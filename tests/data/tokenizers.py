"""Tokenizers of every way of splitting there is, each trained in a moment."""

from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.data.conftest import LLAMA3_SPLIT, TEXTS

SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
# Added on top: what is looked for together with the special tokens, and what is not.
ADDED = (
    AddedToken("<|left|>", special=True, normalized=False, lstrip=True),
    AddedToken("<|right|>", special=True, normalized=False, rstrip=True),
    AddedToken("<|both|>", special=True, normalized=False, lstrip=True, rstrip=True),
    AddedToken("<|word|>", special=True, normalized=False, single_word=True),
    AddedToken("<|im_end|>I", special=False, normalized=False),  # longer than a special token
    AddedToken("\n\n\n", special=False, normalized=False),
    AddedToken("<|norm|>", special=False, normalized=True),
    AddedToken("<|special norm|>", special=True, normalized=True),
)


def _bpe(**changes: Any) -> Tokenizer:
    """Byte-level BPE as GPT-2 splits, with parts changed."""
    tokenizer = Tokenizer(changes.pop("model", models.BPE()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, part in changes.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=[*SPECIALS, "<unk>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


def _spaced(**changes: Any) -> Tokenizer:
    return _bpe(
        model=models.BPE(unk_token="<unk>", byte_fallback=True),
        decoder=decoders.Metaspace(),
        **changes,
    )


_LLAMA3 = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
])  # fmt: skip
_LLAMA2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])

MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": _bpe,
    "gpt2 with a prefix space": lambda: _bpe(
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)
    ),
    "llama 3": lambda: _bpe(pre_tokenizer=_LLAMA3, normalizer=normalizers.NFC()),
    "nfkc, lower case, stripped": lambda: _bpe(
        normalizer=normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]
        )
    ),
    "metaspace always": lambda: _spaced(pre_tokenizer=pre_tokenizers.Metaspace(split=False)),
    "metaspace first": lambda: _spaced(
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")
    ),
    "llama 2": lambda: _spaced(pre_tokenizer=None, normalizer=_LLAMA2),
}


def make(kind: str, with_added: bool = True) -> Any:
    tokenizer = MAKERS[kind]()
    if with_added:
        tokenizer.add_tokens(list(ADDED))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
