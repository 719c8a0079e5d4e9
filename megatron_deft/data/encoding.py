"""From pieces of text to token ids and their weights, at the cost of one tokenisation.

The ids are those of the whole text, `tokenizer(text)`, as long as they begin with the ids that the
text before each boundary between pieces has by itself. Otherwise (a token would straddle the
boundary) the text is cut there and both sides are tokenised apart. Either way training sees what
generation will: a prompt's tokens are fixed before the first token of the response exists.
Rejected: character offsets, since several byte-level tokenizers leave spaces out of them.

*How it is fast.* `tokenizers` looks for its special tokens first and tokenises what lies between
them piece by piece, without a look at what stands on the other side. Such a token is an anchor, and
the text between two anchors a span: what its ids are depends on nothing else. So each span of a
batch is tokenised once, however often it occurs (system messages and tools do in nearly every
sample), and so is each beginning of a span that ends at a boundary (nearly always "assistant" and a
line end). Where a span's beginning has other ids by itself, or the anchors of the text are not read
as such, the sample is encoded by the rule as it stands.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from megatron_deft.data.samples import Encoded, Rendered

Tokenise = Callable[[list[str]], list[list[int]]]  # the ids of each text

_Span = tuple[str, str, str]  # text, between the anchors before and after it ("" for none)
_Head = tuple[int, _Span]  # the span in which a boundary is, by number; and what of it is before


def encode(tokenizer: Any, samples: Sequence[Rendered]) -> list[Encoded]:
    """Token ids and weights of each sample; no special tokens are added to what the text spells.

    The ids are those of the whole text, unless the text before a boundary between pieces has other
    ids by itself; then the text is cut at that boundary (see the module's docstring). The samples
    are views of one array: give them in batches of some hundreds. The tokenizer's own truncation
    and padding are neither used nor changed.
    """
    if not samples:
        return []
    python = _python(tokenizer)
    if getattr(tokenizer, "is_fast", False):
        with _bare(tokenizer) as backend:
            texts = ["".join(sample.pieces) for sample in samples]
            encoded = _encode_batch(backend, samples, texts)
            if encoded[0].tokens.tolist() == python(texts[:1])[0]:
                return encoded  # else its class does more than its backend
    return [encode_exactly(python, sample) for sample in samples]


def encode_exactly(tokenise: Tokenise, sample: Rendered) -> Encoded:
    """One sample by the rule as it is written: tokenise the text before every boundary."""
    done: list[int] = []  # ids up to the last cut
    text, ids = "", list[int]()  # what follows the cut
    weights: list[float] = []
    for piece, weight in zip(sample.pieces, sample.weights, strict=True):
        grown = tokenise([text + piece])[0]
        if grown[: len(ids)] != ids:  # it reads on across the boundary: cut here
            done, text, ids = done + ids, "", []
            grown = tokenise([piece])[0]
        weights += [weight] * (len(grown) - len(ids))
        text, ids = text + piece, grown
    return Encoded(np.array(done + ids, np.int32), np.array(weights, np.float32))


def _encode_batch(backend: Any, samples: Sequence[Rendered], texts: Sequence[str]) -> list[Encoded]:
    tokenise, anchors = _rust(backend), _anchors(backend)
    spans = [anchors.cut(text) for text in texts]
    heads = [_heads(s.pieces, cut) for s, cut in zip(samples, spans, strict=True)]
    beginnings = (head for row in heads if row for _, head in row)
    ids = _read(tokenise, anchors, chain(chain.from_iterable(spans), beginnings))
    joined = [_joined(anchors, cut, row, ids) for cut, row in zip(spans, heads, strict=True)]
    known = [(s, j) for s, j in zip(samples, joined, strict=True) if j]
    # one array for all: one apiece takes longer than filling it
    tokens = np.fromiter(chain.from_iterable(j.tokens for _, j in known), np.int32)
    values = np.fromiter(chain.from_iterable(s.weights for s, _ in known), np.float32)
    weights = values.repeat([count for _, j in known for count in j.counts])
    encoded, start = [], 0
    for sample, join in zip(samples, joined, strict=True):
        if join is None:
            encoded.append(encode_exactly(tokenise, sample))
        else:
            end = start + len(join.tokens)
            encoded.append(Encoded(tokens[start:end], weights[start:end]))
            start = end
    return encoded


class _Anchors(NamedTuple):
    """What finds the anchors of a tokenizer in a text.

    `pattern` also finds the other tokens that `tokenizers` looks for at the same time: the longest
    of those that begin at one place wins, and it may be no anchor.
    """

    pattern: re.Pattern[str] | None
    ids: dict[str, int]

    def cut(self, text: str) -> list[_Span]:
        """The spans of a text, in order."""
        if self.pattern is None:
            return [("", text, "")]
        spans = []
        before, start = "", 0
        for match in self.pattern.finditer(text):
            mark = match[0]
            if mark in self.ids:
                spans.append((before, text[start : match.start()], mark))
                before, start = mark, match.end()
        spans.append((before, text[start:], ""))
        return spans


def _anchors(backend: Any) -> _Anchors:
    """The anchors that a tokenizer has.

    Not a token that is looked for in the normalised text (after the others, so within what lies
    between them), and none that has to stand alone as a word (what follows it decides). Those that
    eat the white space beside them are anchors: a span is read with its anchors.
    """
    raw = {i: t for i, t in backend.get_added_tokens_decoder().items() if not t.normalized}
    ids = {
        token.content: i
        for i, token in raw.items()
        if token.special and not token.single_word and not backend.encode_special_tokens
    }
    texts = tuple(token.content for token in raw.values())
    return _Anchors(_pattern(texts) if ids else None, ids)


@lru_cache(maxsize=4)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(_any_of(texts))


def _any_of(texts: Iterable[str]) -> str:
    """A pattern of any of `texts`, the longest first; a tree of letters, as some have thousands."""
    rest: dict[str, list[str]] = {}
    for text in texts:
        rest.setdefault(text[:1], []).append(text[1:])
    is_optional = rest.pop("", None) is not None
    choice = "|".join(re.escape(letter) + _any_of(tails) for letter, tails in rest.items())
    return f"(?:{choice}){'?' if is_optional else ''}" if rest else ""


def _heads(pieces: Sequence[str], spans: Sequence[_Span]) -> list[_Head] | None:
    """The head at each boundary between pieces; None where a boundary lies within an anchor."""
    heads = []
    boundary = start = number = 0
    for piece in pieces[:-1]:
        boundary += len(piece)
        before, text, after = spans[number]
        while after and boundary >= start + len(text) + len(after):
            start, number = start + len(text) + len(after), number + 1
            before, text, after = spans[number]
        if boundary - start > len(text):
            return None
        heads.append((number, (before, text[: boundary - start], "")))
    return heads


def _read(tokenise: Tokenise, anchors: _Anchors, spans: Iterable[_Span]) -> dict[_Span, list[int]]:
    """The ids of each span's text, without those whose anchors are not read as such."""
    found: dict[_Span, list[int]] = {span: [] for span in spans}
    full = [span for span in found if span[1]]
    for span, ids in zip(full, tokenise(["".join(span) for span in full]), strict=True):
        before, _, after = span
        start, end = 1 if before else 0, len(ids) - (1 if after else 0)
        if (before and ids[:1] != [anchors.ids[before]]) or (
            after and ids[end:] != [anchors.ids[after]]
        ):
            del found[span]
        else:
            found[span] = ids[start:end]
    return found


class _Joined(NamedTuple):
    tokens: list[int]
    counts: list[int]  # of each piece


def _joined(
    anchors: _Anchors,
    spans: Sequence[_Span],
    heads: Sequence[_Head] | None,
    ids: dict[_Span, list[int]],
) -> _Joined | None:
    """The ids of a sample's spans and anchors; None where only the rule can tell them."""
    if heads is None:
        return None
    tokens: list[int] = []
    starts = []  # of each span
    for span in spans:
        if span not in ids:
            return None
        starts.append(len(tokens))
        tokens += ids[span]
        if span[2]:
            tokens.append(anchors.ids[span[2]])
    counts = []
    last = 0
    for number, head in heads:
        if head not in ids:
            return None
        end = starts[number] + len(ids[head])
        if end < last or tokens[starts[number] : end] != ids[head]:
            return None
        counts.append(end - last)
        last = end
    return _Joined(tokens, [*counts, len(tokens) - last])


@contextmanager
def _bare(tokenizer: Any) -> Iterator[Any]:
    """The Rust tokenizer, for a while without truncation and padding, reading special tokens."""
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    is_split = backend.encode_special_tokens
    if truncation is not None:
        backend.no_truncation()
    if padding is not None:
        backend.no_padding()
    backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    try:
        yield backend
    finally:
        backend.encode_special_tokens = is_split
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _rust(backend: Any) -> Tokenise:
    def tokenise(texts: list[str]) -> list[list[int]]:
        # Fast: without offsets.
        return [read.ids for read in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return tokenise


def _python(tokenizer: Any) -> Tokenise:
    def tokenise(texts: list[str]) -> list[list[int]]:
        batch = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [list(ids) for ids in batch["input_ids"]]

    return tokenise
