"""From pieces of text to token ids and their weights, at the cost of one tokenisation.

The ids are those of the whole text, `tokenizer(text)`, as long as they begin with the ids that the
text before each boundary between pieces has by itself. Otherwise (a token would straddle the
boundary) the text is cut there and both sides are tokenised apart. Either way training sees what
generation will: a prompt's tokens are fixed before the first token of the response exists.
Rejected: character offsets, since several byte-level tokenizers leave spaces out of them.

*How it is fast.* `tokenizers` looks for its special tokens first and tokenises what lies between
them piece by piece, without a look at what stands on the other side. Such a token is an anchor: the
ids up to it are the same whatever follows. So the text before a boundary has the ids of the whole
up to the last anchor, and then those of the few characters from there to the boundary, which are
nearly always the same ("assistant" and a line end) and are tokenised once in a batch. Where the
anchors seen in the text are not those seen in the ids, and for a sample that has to be cut, the
text before each boundary is tokenised as it stands.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_deft.data.samples import Encoded, Rendered

Tokenise = Callable[[list[str]], list[list[int]]]  # the ids of each text

_Tail = tuple[str, str]  # an anchor ("" for the beginning of the text), and text after it
_Plan = list[tuple[int, _Tail]]  # of each boundary: how many ids the anchor ends, and the tail


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
            rust = _rust(backend)
            texts = ["".join(sample.pieces) for sample in samples]
            whole = rust(texts)
            if whole[0] == python(texts[:1])[0]:  # else its class does more than its backend
                return _encode_batch(backend, rust, samples, texts, whole)
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


def _encode_batch(
    backend: Any,
    tokenise: Tokenise,
    samples: Sequence[Rendered],
    texts: Sequence[str],
    whole: Sequence[list[int]],
) -> list[Encoded]:
    """Samples from the ids of their whole texts: where in them each piece ends."""
    flat = np.fromiter(chain.from_iterable(whole), np.int32)
    edges = np.cumsum([0, *map(len, whole)]).tolist()
    anchors = _anchors(backend, flat)
    places = _places(anchors, flat, edges)
    plans = [
        _plan(anchors, sample, text, place)
        for sample, text, place in zip(samples, texts, places, strict=True)
    ]
    tails = _tail_ids(tokenise, anchors, {tail for plan in plans if plan for _, tail in plan})
    encoded = []
    for index, (sample, ids, plan) in enumerate(zip(samples, whole, plans, strict=True)):
        counts = _counts(ids, plan, tails)
        if counts is None:
            encoded.append(encode_exactly(tokenise, sample))
        else:
            tokens = flat[edges[index] : edges[index + 1]]
            weights = np.array(sample.weights, np.float32)
            encoded.append(Encoded(tokens, weights.repeat(counts)))
    return encoded


class _Anchors(NamedTuple):
    """The anchors that a batch has, and what finds them in a text.

    `pattern` also finds the other tokens that `tokenizers` looks for at the same time: the longest
    of those that begin at one place wins, and it may be no anchor.
    """

    pattern: re.Pattern[str]
    ids: dict[str, int]

    def find(self, text: str) -> list[tuple[int, str]]:
        """Where each anchor of `text` ends, and the anchor."""
        if not self.ids:
            return []
        found = [(match.end(), match[0]) for match in self.pattern.finditer(text)]
        return [(end, mark) for end, mark in found if mark in self.ids]


def _anchors(backend: Any, flat: NDArray[np.int32]) -> _Anchors:
    """The anchors among the ids of a batch.

    Not a token that is looked for in the normalised text (after the others, so within what lies
    between them), and none that has to stand alone as a word (what follows it decides). Those that
    eat the white space beside them are anchors: they stand in front of the tail as well.
    """
    added = backend.get_added_tokens_decoder()
    seen = np.zeros(max(added, default=0) + 1, bool)
    seen[flat[flat < len(seen)]] = True
    raw = {i: token for i, token in added.items() if seen[i] and not token.normalized}
    ids = {
        token.content: i
        for i, token in raw.items()
        if token.special and not token.single_word and not backend.encode_special_tokens
    }
    texts = sorted((token.content for token in raw.values()), key=len, reverse=True)
    return _Anchors(re.compile("|".join(map(re.escape, texts))), ids)


def _places(
    anchors: _Anchors, flat: NDArray[np.int32], edges: Sequence[int]
) -> list[list[tuple[int, int]]]:
    """Of each sample: where in its ids the anchors are, and which they are."""
    ids = np.fromiter(anchors.ids.values(), np.int32)
    lookup = np.zeros(max(flat.max(initial=0), ids.max(initial=0)) + 1, bool)
    lookup[ids] = True
    hits = np.flatnonzero(lookup[flat])
    cuts = np.searchsorted(hits, edges).tolist()
    pairs = list(zip(hits.tolist(), flat[hits].tolist(), strict=True))
    return [
        [(place - start, token) for place, token in pairs[first:last]]
        for start, first, last in zip(edges, cuts, cuts[1:], strict=False)
    ]


def _plan(
    anchors: _Anchors, sample: Rendered, text: str, places: list[tuple[int, int]]
) -> _Plan | None:
    """What there is to check at each boundary; None where text and ids have other anchors."""
    found = anchors.find(text)
    if [anchors.ids[mark] for _, mark in found] != [token for _, token in places]:
        return None
    plan = []
    char = passed = 0  # the boundary, and how many anchors end before it
    for piece in sample.pieces[:-1]:
        char += len(piece)
        while passed < len(found) and found[passed][0] <= char:
            passed += 1
        if passed:
            end, mark = found[passed - 1]
            plan.append((places[passed - 1][0] + 1, (mark, text[end:char])))
        else:
            plan.append((0, ("", text[:char])))
    return plan


def _tail_ids(
    tokenise: Tokenise, anchors: _Anchors, tails: set[_Tail]
) -> dict[_Tail, list[int] | None]:
    """The ids of each tail behind its anchor; None where the anchor is not read as one."""
    ordered = sorted(tails)
    ids = tokenise([mark + tail for mark, tail in ordered])
    found: dict[_Tail, list[int] | None] = {}
    for (mark, tail), read in zip(ordered, ids, strict=True):
        if mark:
            found[mark, tail] = read[1:] if read[:1] == [anchors.ids[mark]] else None
        else:
            found[mark, tail] = read
    return found


def _counts(
    ids: list[int], plan: _Plan | None, tails: dict[_Tail, list[int] | None]
) -> list[int] | None:
    """How many ids each piece has; None where they do not begin with those before a boundary."""
    if plan is None:
        return None
    counts = []
    start = 0
    for behind, key in plan:
        tail = tails[key]
        if tail is None:
            return None
        end = behind + len(tail)
        if end < start or ids[behind:end] != tail:
            return None
        counts.append(end - start)
        start = end
    return [*counts, len(ids) - start]


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
