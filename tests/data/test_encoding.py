"""Encoding at one tokenisation gives what tokenising the text before every boundary gives."""

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_deft.data import encoding
from megatron_deft.data.encoding import encode, encode_exactly
from megatron_deft.data.samples import Rendered
from tests.data import tokenizers

MARKS = [*tokenizers.SPECIALS, *(token.content for token in tokenizers.ADDED)]
PARTS = [*"aI 1\n\t|_é🙂'", "  ", "\n\n", "<|im", "_end|>", "word", "\uff29\uff29", *MARKS, *MARKS]
PIECE = st.lists(st.sampled_from(PARTS), max_size=6).map("".join)
SAMPLE = st.lists(PIECE, min_size=1, max_size=6)


@lru_cache
def tokenizer_of(kind: str, with_added: bool = True) -> Any:
    return tokenizers.make(kind, with_added)


def exactly(tokenizer: Any, sample: Rendered) -> encoding.Encoded:
    def tokenise(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    return encode_exactly(tokenise, sample)


def rendered(pieces: list[str]) -> Rendered:
    """Each piece has a weight of its own, so that the weights tell where it is."""
    return Rendered(tuple(pieces), tuple(float(i) for i in range(len(pieces))))


@pytest.mark.parametrize("with_added", [True, False])
@pytest.mark.parametrize("kind", tokenizers.MAKERS)
@settings(max_examples=150)
@given(samples=st.lists(SAMPLE, min_size=1, max_size=4))
@example(samples=[["<|im_start|>a", "<|im", "_end|>", "I"]])  # a mark across a boundary
@example(samples=[["<|im_end|>", "I<|im_end|>"], ["a<|word|>", "b<|im_end|>"]])
@example(samples=[["a <|right|>", "  b", " <|left|>c", "  ", "<|both|>"]])
@example(samples=[["\n", "\nb<s>", "\n", "\nb"]])
def test_it_is_exact(kind: str, with_added: bool, samples: list[list[str]]) -> None:
    tokenizer = tokenizer_of(kind, with_added)
    wanted = [exactly(tokenizer, rendered(pieces)) for pieces in samples]
    got = encode(tokenizer, [rendered(pieces) for pieces in samples])
    for one, other in zip(got, wanted, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.weights.tolist() == other.weights.tolist()
        assert (one.tokens.dtype, one.weights.dtype) == (np.int32, np.float32)


CHAT = ["<s><|im_start|>user\nit is a\n<|im_end|>\n<|im_start|>assistant\n", "HI<|im_end|>", "\n"]


def test_what_a_batch_has_again_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("gpt2")
    seen: list[str] = []
    rust = encoding._rust

    def watched(backend: Any) -> encoding.Tokenise:
        tokenise = rust(backend)
        return lambda texts: seen.extend(texts) or tokenise(texts)  # type: ignore[func-returns-value]

    monkeypatch.setattr(encoding, "_rust", watched)
    encode(tokenizer, [rendered(["<|im_start|>user\nI", *CHAT[1:], *CHAT])] + [rendered(CHAT)] * 50)
    assert sorted(seen) == sorted(
        [
            "<|im_start|>user\nIHI<|im_end|>",
            "<|im_start|>user\nI",  # up to the boundary
            "<|im_end|>\n<s>",
            "<|im_start|>user\nit is a\n<|im_end|>",
            "<|im_end|>\n<|im_start|>",
            "<|im_start|>assistant\nHI<|im_end|>",
            "<|im_start|>assistant\n",
            "<|im_end|>\n",
        ]
    )


def test_the_longest_of_many_tokens_is_found() -> None:
    tokens = [f"<unused{number}>" for number in range(6000)] + ["<a", "<a>b", "\n", "\n\n", ".*"]
    pattern = encoding._pattern(tuple(tokens))
    text = "x<a><a>b<unused12><unused1\n\n\n.*.x<unused5999><unused6000>"
    found = ["<a", "<a>b", "<unused12>", "\n\n", "\n", ".*", "<unused5999>"]
    assert pattern.findall(text) == found


def test_the_tokenizers_own_settings_are_neither_used_nor_changed() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("gpt2"))
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(max_length=3)
    backend.enable_padding(length=40, pad_token="<s>", pad_id=0)
    backend.encode_special_tokens = True
    state = (backend.truncation, backend.padding, backend.encode_special_tokens)
    (sample,) = encode(tokenizer, [rendered(CHAT)])
    assert (backend.truncation, backend.padding, backend.encode_special_tokens) == state
    expected = exactly(tokenizer_of("gpt2"), rendered(CHAT))
    assert sample.tokens.tolist() == expected.tokens.tolist()


def test_special_tokens_that_are_read_as_text_are_no_anchors() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("gpt2"))
    tokenizer.split_special_tokens = True
    (sample,) = encode(tokenizer, [rendered(CHAT)])
    expected = exactly(tokenizer, rendered(CHAT))
    assert sample.tokens.tolist() == expected.tokens.tolist()
    assert len(sample.tokens) > len(exactly(tokenizer_of("gpt2"), rendered(CHAT)).tokens)


class Doubles(type(tokenizers.make("gpt2"))):  # type: ignore[misc]
    """A tokenizer class that does more than its backend."""

    def __call__(self, texts: list[str], **kwargs: Any) -> Any:
        return super().__call__([text * 2 for text in texts], **kwargs)


def test_a_tokenizer_class_with_more_to_it_is_asked_itself() -> None:
    tokenizer = Doubles(tokenizer_object=tokenizer_of("gpt2").backend_tokenizer)
    (sample,) = encode(tokenizer, [rendered(["ab "])])
    assert tokenizer.decode(sample.tokens.tolist()) == "ab ab "


def test_a_tokenizer_that_is_not_fast() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    (sample,) = encode(tokenizer, [rendered(["question ", "né", "</s>"])])
    assert tokenizer.decode(sample.tokens.tolist()) == "question né</s>"
    assert sample.weights.tolist() == [0.0] * 9 + [1.0] * 3 + [2.0]


@pytest.mark.parametrize("pieces", [[""], ["", ""], ["", "a", ""]])
def test_empty_pieces(pieces: list[str]) -> None:
    tokenizer = tokenizer_of("gpt2")
    (sample,) = encode(tokenizer, [rendered(pieces)])
    assert tokenizer.decode(sample.tokens.tolist()) == "".join(pieces)


def test_no_samples() -> None:
    assert encode(tokenizer_of("gpt2"), []) == []
