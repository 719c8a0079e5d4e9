"""From a conversation, or a prompt and its response, to token ids and the mask of trained tokens.

Two steps. *Rendering* turns one row into consecutive pieces of text, each with its loss weight. It needs
no `{% generation %}` marker: the boundaries come from rendering the conversation turn by turn
through the tokenizer's own template, and a template for which that is not exact is an error.
Rejected: searching the text for marker strings, which breaks as soon as a user quotes them.

*Encoding* turns pieces into ids: those of the whole text, `tokenizer(text)`, as long as they begin
with the ids that the text before each boundary has by itself. Otherwise (a token would straddle the
boundary) the text is cut there and both sides are tokenised apart. Either way training sees what
generation will: a prompt's tokens are fixed before the first token of the response exists.
Rejected: character offsets, since several byte-level tokenizers leave spaces out of them.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from megatron_deft.data.samples import IGNORE, Encoded, Rendered
from megatron_deft.errors import UserError

_MARKS = {  # (color, trained) -> what stands before and after the text
    (False, False): ("", ""),
    (False, True): ("⟦", "⟧"),
    (True, False): ("\x1b[2m", "\x1b[0m"),
    (True, True): ("\x1b[32m", "\x1b[0m"),
}


def render_columns(
    tokenizer: Any, prompt: str, response: str, use_original_prompt: bool = False
) -> Rendered:
    """A prompt and the response to learn, as the released trainers (verl's SFTDataset) join them.

    The prompt is put into a chat as its only user turn, or taken as it is (special tokens written
    out) with `use_original_prompt`. The response is trained, and the tokenizer's eos after it.
    Errors: UserError when the tokenizer has no chat template or no eos token.
    """
    if not tokenizer.eos_token:
        raise UserError(
            f"tokenizer {_name(tokenizer)}: no eos_token, so a response could never end: "
            "set eos_token in its tokenizer_config.json"
        )
    if not use_original_prompt:
        prompt = _apply(tokenizer, [{"role": "user", "content": prompt}], True)
    return Rendered((prompt, response + tokenizer.eos_token), (0.0, 1.0))


def render_messages(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> Rendered:
    """A conversation through the tokenizer's chat template; assistant turns are trained.

    `messages`: mappings with `role`, `content` and whatever else the template reads (None is the
    same as absent, as parquet writes it). `train: false` on an assistant turn leaves it out of the
    loss. A trained turn runs from the end of the generation prompt to its end-of-turn token; white
    space that the template puts after that token is not trained, since generation stops before it.

    Errors: UserError when a message is malformed, no turn is trained, there is no template, the
    template refuses the conversation, or the text up to a trained turn is not the beginning of the
    whole text (templates that drop history or thinking), so that no mask would be exact.
    """
    clean = [_clean(index, message) for index, message in enumerate(messages)]
    turns = [index for index, message in enumerate(messages) if _is_trained(index, message)]
    if not turns:
        raise UserError(
            "messages: no assistant turn to train on: add one, or drop `train: false` from one"
        )
    whole = _apply(tokenizer, clean, False)
    pieces: list[str] = []
    weights: list[float] = []
    position = 0
    for turn in turns:
        if turn == 0:
            raise UserError("messages[0] is an assistant turn: put a user or system turn before it")
        before = _apply(tokenizer, clean[:turn], True)
        last = turn == len(clean) - 1
        through = whole if last else _apply(tokenizer, clean[: turn + 1], False)
        if not (
            whole.startswith(through) and through.startswith(before) and position <= len(before)
        ):
            raise UserError(
                f"chat template of {_name(tokenizer)}: the text up to messages[{turn}] (assistant) "
                "is not the beginning of the whole conversation (a template that drops history or "
                "thinking?), so its mask cannot be exact: set `train: false` on every assistant "
                "turn but the last, or give the tokenizer a template that keeps every turn"
            )
        end = _end_of_turn(tokenizer, through, len(before))
        pieces += [whole[position : len(before)], whole[len(before) : end]]
        weights += [0.0, 1.0]
        position = end
    return Rendered((*pieces, whole[position:]), (*weights, 0.0))


def encode(tokenizer: Any, samples: Sequence[Rendered]) -> list[Encoded]:
    """Token ids and mask of each sample; no special tokens are added to what the text spells.

    The ids are those of the whole text, unless the text before a boundary between pieces has other
    ids by itself; then the text is cut at that boundary (see the module's docstring).
    """
    texts = [piece for sample in samples for piece in sample.pieces]
    texts += ["".join(sample.pieces) for sample in samples]
    ids = _token_ids(tokenizer, texts)
    alone, whole = iter(ids), ids[len(ids) - len(samples) :]
    return [
        _encode_one(tokenizer, sample, [next(alone) for _ in sample.pieces], whole[index])
        for index, sample in enumerate(samples)
    ]


def render_sample(tokenizer: Any, tokens: Any, labels: Any, color: bool) -> str:
    """The text of one row of a batch with its trained tokens marked, for a person to check.

    `tokens`, `labels`: int [s], as `collate` makes them. Trained text is read from the labels (so
    a mask or shift that is wrong shows) and is green where `color`, between ⟦ and ⟧ otherwise.
    """
    inputs, targets = [int(t) for t in tokens], [int(t) for t in labels]
    marked = [(token, False) for token in inputs[:1]]
    for index, target in enumerate(targets):
        if target != IGNORE:
            marked.append((target, True))
        elif index + 1 < len(inputs):
            marked.append((inputs[index + 1], False))
    parts = []
    for is_trained, run in groupby(marked, key=lambda pair: pair[1]):
        text = _decode(tokenizer, [token for token, _ in run])
        before, after = _MARKS[color, is_trained]
        parts.append(f"{before}{text}{after}")
    return "".join(parts)


def _encode_one(
    tokenizer: Any, sample: Rendered, alone: Sequence[Sequence[int]], whole: Sequence[int]
) -> Encoded:
    """One sample from the ids of each piece `alone` and of the `whole` text."""
    if [token for piece in alone for token in piece] == list(whole):  # the common case, by far
        lengths = [len(piece) for piece in alone]
        return Encoded(
            np.array(whole, np.int32), np.repeat(np.array(sample.weights, np.float32), lengths)
        )
    done: list[int] = []  # ids up to the last cut
    text, ids = "", list[int]()  # what follows the cut
    weights: list[float] = []
    for piece, weight in zip(sample.pieces, sample.weights, strict=True):
        grown = _token_ids(tokenizer, [text + piece])[0]
        if grown[: len(ids)] != ids:  # it reads on across the boundary: cut here
            done, text, ids = done + ids, "", []
            grown = _token_ids(tokenizer, [piece])[0]
        weights += [weight] * (len(grown) - len(ids))
        text, ids = text + piece, grown
    return Encoded(np.array(done + ids, np.int32), np.array(weights, np.float32))


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    batch = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [list(ids) for ids in batch["input_ids"]]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, Any]], generation: bool) -> str:
    """The text of `messages`, with the opening of an assistant turn after it where `generation`."""
    from jinja2 import TemplateError  # here: only tokenizers with a template need it

    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {_name(tokenizer)} has no chat template: take an instruct model's, "
            "add a chat_template to its tokenizer_config.json, or set "
            "data.use_original_prompt=true with prompts that are already written out"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation
        )
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        reason = " ".join(str(error).split())
        raise UserError(
            f"chat template of {_name(tokenizer)} refuses the turns [{roles}]: {reason}"
        ) from error
    assert isinstance(text, str)
    return text


def _clean(index: int, message: Any) -> dict[str, Any]:
    """A message without `train` and None: parquet writes None for absent keys, 4.57 renders it."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(f"messages[{index}]: expected an object with `role`, got {message!r:.80}")
    if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
        kind = type(message.get("content")).__name__
        raise UserError(f"messages[{index}].content: expected a string, got {kind}")
    kept = {key: value for key, value in message.items() if key != "train" and value is not None}
    return {"content": None, **kept}


def _is_trained(index: int, message: Mapping[str, Any]) -> bool:
    train = message.get("train")
    if train is not None and not isinstance(train, bool):
        raise UserError(f"messages[{index}].train: expected true or false, got {train!r}")
    if train and message["role"] != "assistant":
        raise UserError(f"messages[{index}].train: only assistant turns can be trained")
    return message["role"] == "assistant" and train is not False


def _end_of_turn(tokenizer: Any, text: str, start: int) -> int:
    """Where the trained part of text[start:] ends: after its last special token, if it has one.

    Without a special token at the end, the white space is itself the end-of-turn mark and counts.
    """
    end = len(text.rstrip())
    closed = any(text.endswith(special, start, end) for special in _special_tokens(tokenizer))
    return end if closed else len(text)


@lru_cache(maxsize=4)  # the tokenizer rebuilds its table at every look
def _special_tokens(tokenizer: Any) -> frozenset[str]:
    # Not all_special_tokens: a base Llama 3 ends turns with a token that has no role of its own.
    return frozenset(
        str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
    )


def _name(tokenizer: Any) -> str:
    return str(tokenizer.name_or_path or type(tokenizer).__name__)
