"""From a conversation, or a prompt and its response, to text with the weight of each of its pieces.

It needs no `{% generation %}` marker: the boundaries come from rendering the conversation turn by
turn through the tokenizer's own template, and a template for which that is not exact is an error.
Rejected: searching the text for marker strings, which breaks as soon as a user quotes them.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

from megatron_deft.data.encoding import encode as encode
from megatron_deft.data.messages import Conversation, read_conversation, read_tools
from megatron_deft.data.samples import IGNORE, Rendered
from megatron_deft.data.templates import name_of, renderer
from megatron_deft.errors import UserError

_INSTRUCTS = ("system", "developer")  # roles whose messages a template may not leave out
_MARKS = {  # (color, trained) -> what stands before and after the text
    (False, False): ("", ""),
    (False, True): ("⟦", "⟧"),
    (True, False): ("\x1b[2m", "\x1b[0m"),
    (True, True): ("\x1b[32m", "\x1b[0m"),
}


def render_columns(
    tokenizer: Any,
    prompt: str,
    response: str,
    use_original_prompt: bool = False,
    weight: float = 1.0,
) -> Rendered:
    """A prompt and the response to learn, as the released trainers (verl's SFTDataset) join them.

    The prompt is put into a chat as its only user turn, or taken as it is (special tokens written
    out) with `use_original_prompt`. The response is trained with `weight`, and the tokenizer's eos
    after it.

    Errors: UserError when the tokenizer has no chat template or no eos token, and for text that is
    no Unicode.
    """
    if not tokenizer.eos_token:
        raise UserError(
            f"tokenizer {name_of(tokenizer)}: no eos_token, so a response could never end: "
            "set eos_token in its tokenizer_config.json"
        )
    if not use_original_prompt:
        prompt = renderer(tokenizer, None)([{"role": "user", "content": prompt}], True)
    return _checked(Rendered((prompt, response + tokenizer.eos_token), (0.0, weight)))


def render_messages(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any = None
) -> Rendered:
    """A conversation through the tokenizer's chat template; assistant turns are trained.

    `messages`: mappings with `role` (system and developer at the beginning, user, assistant, tool),
    `content`, `tool_calls` and whatever else the template reads. `train: false` on an assistant
    turn leaves it out of the loss, `weight` (0 or more, 1 if absent) is what each of its tokens
    counts for. `tools`: JSON schemas, a list or its JSON text, for the template. None is the same
    as absent, as parquet writes it; a JSON text is read as it stands.

    A trained turn runs from the end of the generation prompt to its end-of-turn token; white space
    that the template puts after that token is not trained, since generation stops before it. A
    template that writes the date writes a fixed one (see `templates`).

    Errors: UserError when a message is malformed or out of order, no turn is trained, there is no
    template, the template refuses the conversation or leaves out tools, calls, a system message or
    what a trained turn says or thinks, or the text up to a trained turn is not the beginning of the
    whole text (templates that drop history or thinking), so that no mask would be exact.
    """
    conversation = read_conversation(messages)
    schemas = read_tools(tools)
    turns = [index for index, weight in enumerate(conversation.weights) if weight]
    if not turns:
        raise UserError(
            "messages: no assistant turn to train on: add one, or drop `train: false` or "
            "`weight: 0` from one"
        )
    clean = conversation.messages
    render = renderer(tokenizer, schemas)
    whole = render(clean, False)
    _check_nothing_is_left_out(tokenizer, conversation, schemas, whole)
    pieces: list[str] = []
    weights: list[float] = []
    position = 0
    for turn in turns:
        before = render(clean[:turn], True)
        through = whole if turn == len(clean) - 1 else render(clean[: turn + 1], False)
        if not through.startswith(before) and whole.startswith(through):
            raise UserError(
                f"chat template of {name_of(tokenizer)}: messages[{turn}] (assistant) does not "
                "begin as the generation prompt does (a prompt that opens a thought which the "
                "turn lacks?), so its mask cannot be exact: give the turn its thinking, or give "
                "the tokenizer another template"
            )
        if not (whole.startswith(through) and position <= len(before)):
            raise UserError(
                f"chat template of {name_of(tokenizer)}: the text up to messages[{turn}] "
                "(assistant) is not the beginning of the whole conversation (a template that drops "
                "history or thinking?), so its mask cannot be exact: set `train: false` on every "
                "assistant turn but the last, or give the tokenizer a template that keeps every "
                "turn"
            )
        end = _end_of_turn(tokenizer, through, len(before))
        if end == len(before):
            raise UserError(
                f"chat template of {name_of(tokenizer)} writes nothing for messages[{turn}] "
                "(assistant): set `train: false` on it, or take another template"
            )
        _check_turn_is_whole(tokenizer, clean[turn], turn, whole, (position, len(before), end))
        pieces += [whole[position : len(before)], whole[len(before) : end]]
        weights += [0.0, conversation.weights[turn]]
        position = end
    if position < len(whole):
        pieces.append(whole[position:])
        weights.append(0.0)
    return _checked(Rendered(tuple(pieces), tuple(weights)))


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


def _check_nothing_is_left_out(
    tokenizer: Any, conversation: Conversation, tools: Any, whole: str
) -> None:
    """Whether the template wrote the tools, calls and system messages; many do not look at them."""
    if tools is not None and whole == _text_without_tools(tokenizer, conversation):
        raise UserError(
            f"chat template of {name_of(tokenizer)} does not write tools: take a template that "
            "does (qwen, llama3, or a file), or leave the tools out"
        )
    for index, message in enumerate(conversation.messages):
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in whole:
                raise UserError(
                    f"chat template of {name_of(tokenizer)} does not write the tool_calls of "
                    f"messages[{index}]: take a template that does (qwen, llama3, or a file)"
                )
        if message["role"] in _INSTRUCTS and not _holds(whole, message["content"]):
            raise UserError(
                f"chat template of {name_of(tokenizer)} does not write messages[{index}] "
                f"({message['role']}): take a template that does, or leave the message out"
            )


def _check_turn_is_whole(
    tokenizer: Any, message: Mapping[str, Any], index: int, whole: str, places: tuple[int, int, int]
) -> None:
    """Whether a trained turn says all that its message does.

    `places`: the ends of the trained turn before, of this one's generation prompt, and of it.
    Several templates leave thoughts out, cut what stands before </think> off the content, or drop
    content that stands beside a call. A generation prompt may already open the thought, so a turn
    that lacks something is looked at together with what stands before it.
    """
    last, start, end = places
    for key in ("content", "reasoning_content"):
        said = message.get(key)
        if not isinstance(said, str):
            continue
        if not (_holds(whole[start:end], said) or _holds(whole[last:end], said)):
            raise UserError(
                f"chat template of {name_of(tokenizer)} does not write all of the "
                f"{'thinking' if key != 'content' else key} of messages[{index}] (assistant): take "
                "a template that does, leave it out, or set `train: false` on the turn"
            )


def _holds(text: str, part: str) -> bool:
    """Whether `text` has `part` in it, whatever the template did to white space."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())


def _text_without_tools(tokenizer: Any, conversation: Conversation) -> str | None:
    try:
        return renderer(tokenizer, None)(conversation.messages, False)
    except UserError:  # it does not do without them
        return None


def _checked(sample: Rendered) -> Rendered:
    """The sample, if it is Unicode: JSON can spell half a character, which no tokenizer takes."""
    for piece in sample.pieces:
        try:
            piece.encode()
        except UnicodeEncodeError as error:
            near = piece[max(error.start - 20, 0) : error.start + 1]
            raise UserError(
                f"the text has half a character (a lone surrogate) at the end of {near!a}: "
                "mend it, or leave the row out"
            ) from error
    return sample


def _end_of_turn(tokenizer: Any, text: str, start: int) -> int:
    """Where the trained part of text[start:] ends: after its last special token, if it has one.

    Without a special token at the end, the white space is itself the end-of-turn mark and counts.
    """
    end = len(text.rstrip())
    closed = text.endswith(_special_tokens(tokenizer), start, end)
    return end if closed else len(text)


@lru_cache(maxsize=4)  # the tokenizer rebuilds its table at every look
def _special_tokens(tokenizer: Any) -> tuple[str, ...]:
    # Not all_special_tokens: a base Llama 3 ends turns with a token that has no role of its own.
    return tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
