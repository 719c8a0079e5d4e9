"""Masks are exact for every template, and ids are what the tokenizer makes of the whole text."""

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_deft.data.chat import encode, render_columns, render_messages, render_sample
from megatron_deft.data.samples import IGNORE, Encoded, Rendered
from megatron_deft.errors import UserError
from tests.data.conftest import (
    ART,
    CHATML,
    LOOKS_AT_KEYS,
    OPENS_A_THOUGHT,
    PLAIN,
    REFUSES,
    STRIPS_THINKING,
)

CONVERSATION = [
    {"role": "system", "content": "Read the art."},
    {"role": "user", "content": ART},
    {"role": "assistant", "content": "HI"},
    {"role": "user", "content": "Again, please.  "},
    {"role": "assistant", "content": "it is   HI\n\n don't ask"},
]


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def trained_texts(tokenizer: Any, sample: Encoded) -> list[str]:
    """The decoded text of each run of trained tokens."""
    edges = np.flatnonzero(np.diff((sample.weights > 0).astype(int), prepend=0, append=0))
    return [
        tokenizer.decode(sample.tokens[start:end].tolist())
        for start, end in edges.reshape(-1, 2).tolist()
    ]


def shown(tokenizer: Any, sample: Encoded, color: bool = False) -> str:
    labels = np.where(sample.weights[1:] > 0, sample.tokens[1:], IGNORE)
    return render_sample(tokenizer, sample.tokens[:-1], labels, color)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["HI<|im_end|>", "it is   HI\n\n don't ask<|im_end|>"]),
        (STRIPS_THINKING, ["HI<|im_end|>", "it is   HI\n\n don't ask<|im_end|>"]),
        (PLAIN, ["HI\n", "it is   HI\n\n don't ask\n"]),
    ],
)
def test_assistant_turns_and_their_ends_are_trained(
    with_template: Callable[..., Any], template: str, expected: list[str]
) -> None:
    tokenizer = with_template(template)
    rendered = render_messages(tokenizer, CONVERSATION)
    (sample,) = encode(tokenizer, [rendered])
    assert trained_texts(tokenizer, sample) == expected
    whole = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert "".join(rendered.pieces) == whole
    assert tokenizer.decode(sample.tokens.tolist()) == whole


@pytest.mark.parametrize("kind", ["tokenizer", "llama3_tokenizer"])
def test_ids_are_those_of_the_whole_text(request: pytest.FixtureRequest, kind: str) -> None:
    tokenizer = request.getfixturevalue(kind)
    (sample,) = encode(tokenizer, [render_messages(tokenizer, CONVERSATION)])
    assert sample.tokens.tolist() == ids(
        tokenizer, tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    )


def test_the_end_of_turn_is_trained_where_it_is_not_the_eos_token(llama3_tokenizer: Any) -> None:
    assert llama3_tokenizer.eos_token == "<|end_of_text|>"
    rendered = render_messages(llama3_tokenizer, CONVERSATION)
    (sample,) = encode(llama3_tokenizer, [rendered])
    assert trained_texts(llama3_tokenizer, sample) == [
        "HI<|eot_id|>",
        "it is   HI\n\n don't ask<|eot_id|>",
    ]
    assert sample.tokens[0] == llama3_tokenizer.bos_token_id


def test_a_prompt_keeps_the_ids_it_has_in_generation(tokenizer: Any) -> None:
    """GPT-2's splitting takes the last line end apart once a letter follows: not in a prompt."""
    prompt, response = "user\n\n", "HI"
    whole = ids(tokenizer, prompt + response)
    assert whole[: len(ids(tokenizer, prompt))] != ids(tokenizer, prompt)
    (sample,) = encode(tokenizer, [Rendered((prompt, response), (False, True))])
    assert sample.tokens[sample.weights == 0].tolist() == ids(tokenizer, prompt)


def test_a_token_that_would_straddle_a_boundary_is_cut_there(tokenizer: Any) -> None:
    prompt, response = "a\n", "\nb"
    assert len(ids(tokenizer, "\n\n")) == 1, "the fixture must merge two line ends"
    (sample,) = encode(tokenizer, [Rendered((prompt, response), (False, True))])
    assert sample.tokens.tolist() == ids(tokenizer, prompt) + ids(tokenizer, response)
    assert trained_texts(tokenizer, sample) == [response]


def test_only_the_straddled_boundary_is_cut(tokenizer: Any) -> None:
    pieces = ("say <|im_start|>", "HI<|im_end|>", "\n", "\nX")
    (sample,) = encode(tokenizer, [Rendered(pieces, (False, True, False, True))])
    expected = ids(tokenizer, "say <|im_start|>HI<|im_end|>\n") + ids(tokenizer, "\nX")
    assert sample.tokens.tolist() == expected
    assert trained_texts(tokenizer, sample) == ["HI<|im_end|>", "\nX"]


def test_a_tokenizer_that_prefixes_a_space_keeps_the_whole_texts_ids(
    metaspace_tokenizer: Any,
) -> None:
    prompt, response = "What word?", "of course"
    whole = ids(metaspace_tokenizer, prompt + response)
    apart = ids(metaspace_tokenizer, prompt) + ids(metaspace_tokenizer, response)
    assert apart != whole, "the fixture must tell a piece from its place in the text"
    (sample,) = encode(metaspace_tokenizer, [Rendered((prompt, response), (False, True))])
    assert sample.tokens.tolist() == whole
    assert sample.weights.sum() == len(whole) - len(ids(metaspace_tokenizer, prompt))


TEXT = st.text(st.sampled_from(list("aI 1\n\t|_-é🙂'")), max_size=12)


@settings(max_examples=200)
@given(pieces=st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=5))
def test_any_pieces_keep_their_text_and_mask(
    tokenizer: Any, pieces: list[tuple[str, bool]]
) -> None:
    texts, flags = zip(*pieces, strict=True)
    (sample,) = encode(tokenizer, [Rendered(texts, flags)])
    assert len(sample.tokens) == len(sample.weights)
    for flag in (True, False):
        tokens = sample.tokens[sample.weights == flag].tolist()
        expected = "".join(text for text, trained in pieces if trained == flag)
        assert tokenizer.decode(tokens) == expected


def test_train_false_leaves_a_turn_out(tokenizer: Any) -> None:
    messages = [dict(message) for message in CONVERSATION]
    messages[2]["train"] = False  # type: ignore[assignment]
    (sample,) = encode(tokenizer, [render_messages(tokenizer, messages)])
    assert trained_texts(tokenizer, sample) == ["it is   HI\n\n don't ask<|im_end|>"]


THINKING: list[dict[str, Any]] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "<think>hm</think>1", "train": None, "tool_calls": None},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "<think>so</think>2"},
]


def test_a_template_that_drops_history_is_refused_by_name_and_turn(
    with_template: Callable[..., Any],
) -> None:
    tokenizer = with_template(STRIPS_THINKING)
    with pytest.raises(UserError, match=re.escape("messages[1] (assistant)")) as error:
        render_messages(tokenizer, THINKING)
    assert tokenizer.name_or_path in str(error.value)
    assert "train: false" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_generation_prompt_that_no_turn_begins_with_is_refused(
    with_template: Callable[..., Any],
) -> None:
    with pytest.raises(UserError, match=re.escape("messages[2] (assistant)")):
        render_messages(with_template(OPENS_A_THOUGHT), CONVERSATION)


def test_a_template_sees_neither_train_nor_keys_that_are_none(
    with_template: Callable[..., Any],
) -> None:
    tokenizer = with_template(LOOKS_AT_KEYS)
    without = render_messages(tokenizer, CONVERSATION)
    filled: list[dict[str, Any]] = [{**turn, "tool_calls": None} for turn in CONVERSATION]
    filled[2]["train"], filled[3]["train"] = True, False
    assert render_messages(tokenizer, filled) == without
    called = render_messages(with_template(LOOKS_AT_KEYS.replace("train", "role")), CONVERSATION)
    assert called != without, "the template must tell them apart"


def test_the_mend_that_the_error_names_works(with_template: Callable[..., Any]) -> None:
    tokenizer = with_template(STRIPS_THINKING)
    mended = [THINKING[0], THINKING[1] | {"train": False}, *THINKING[2:]]
    (sample,) = encode(tokenizer, [render_messages(tokenizer, mended)])
    assert trained_texts(tokenizer, sample) == ["<think>so</think>2<|im_end|>"]
    assert "hm" not in tokenizer.decode(sample.tokens.tolist())


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "x"}], "no assistant turn"),
        ([{"role": "assistant", "content": "x"}], "messages[0]: assistant is the first message"),
        ([{"content": "x"}], "messages[0]: expected an object with `role`"),
        (["x"], "messages[0]: expected an object with `role`"),
        ([{"role": "user", "content": 3}], "messages[0].content: expected a string, got int"),
        ([{"role": "user", "content": "x", "train": True}], "only assistant turns"),
        ([USER, {"role": "assistant", "content": "x", "train": "no"}], "expected true or false"),
        ([], "the list is empty"),
    ],
)
def test_malformed_messages_are_named(tokenizer: Any, messages: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        render_messages(tokenizer, messages)


def test_a_template_that_refuses_is_one_line(with_template: Callable[..., Any]) -> None:
    tokenizer = with_template(REFUSES)
    with pytest.raises(UserError, match=r"refuses the turns \[system, user, .* must alternate$"):
        render_messages(tokenizer, CONVERSATION)


def test_no_template_names_the_remedy(with_template: Callable[..., Any]) -> None:
    tokenizer = with_template(None)
    with pytest.raises(UserError, match=r"chat_template.*data\.use_original_prompt=true"):
        render_messages(tokenizer, CONVERSATION)
    with pytest.raises(UserError, match="no chat template"):
        render_columns(tokenizer, "question", "answer")
    assert render_columns(tokenizer, "Q: ", "A", use_original_prompt=True).pieces[0] == "Q: "


TOOLS = [{"name": "look", "parameters": {"type": "object"}}]
CALL = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"at": "it"}}]}
CALLED = [USER, CALL, {"role": "tool", "content": "HI"}, {"role": "assistant", "content": "HI"}]
# As DeepSeek's: the arguments are added to a text, so they must be one. As Hermes': an object.
WRITES_CALLS = CHATML.replace(
    "m.content",
    "(m.content or '') + (m.tool_calls[0].function.name + ARGUMENTS if m.tool_calls else '')",
)
WRITES_TOOLS = "{% if tools %}{{ tools | tojson + '\n' }}{% endif %}"


@pytest.mark.parametrize("arguments", ["ARGS", "(ARGS | tojson)", "(ARGS | string)", "('' ~ ARGS)"])
def test_tools_calls_and_their_answers(with_template: Callable[..., Any], arguments: str) -> None:
    arguments = arguments.replace("ARGS", "m.tool_calls[0].function.arguments")
    tokenizer = with_template(WRITES_TOOLS + WRITES_CALLS.replace("ARGUMENTS", arguments))
    for tools in (TOOLS, json.dumps(TOOLS)):
        rendered = render_messages(tokenizer, CALLED, tools)
        assert rendered.pieces[0].startswith(json.dumps(TOOLS) + "\n<|im_start|>user")
        (sample,) = encode(tokenizer, [rendered])
        assert trained_texts(tokenizer, sample) == ['look{"at": "it"}<|im_end|>', "HI<|im_end|>"]


def test_tools_and_calls_that_a_template_leaves_out_are_refused(
    with_template: Callable[..., Any],
) -> None:
    tokenizer = with_template(CHATML)
    with pytest.raises(UserError, match=r"template of .* does not write tools: take a template"):
        render_messages(tokenizer, CONVERSATION, TOOLS)
    tokenizer = with_template(CHATML.replace("m.content", "(m.content or '')"))
    with pytest.raises(UserError, match=r"does not write the tool_calls of messages\[1\]"):
        render_messages(tokenizer, CALLED)


def test_a_tokenizer_with_a_template_for_tools(with_template: Callable[..., Any]) -> None:
    tokenizer = with_template({"default": CHATML, "tool_use": WRITES_TOOLS + CHATML})  # type: ignore[arg-type]
    plain = "".join(render_messages(tokenizer, CONVERSATION).pieces)
    assert "".join(render_messages(tokenizer, CONVERSATION, TOOLS).pieces).endswith(plain)
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(UserError, match=r"^chat template of"):
        render_messages(tokenizer, CONVERSATION)


def test_a_turn_that_a_template_leaves_out_is_refused(with_template: Callable[..., Any]) -> None:
    tokenizer = with_template(
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"writes nothing for messages\[1\] \(assistant\)"):
        render_messages(tokenizer, CONVERSATION[1:3])


def test_weights_are_those_of_the_turns(tokenizer: Any) -> None:
    messages: list[dict[str, Any]] = [dict(message) for message in CONVERSATION]
    messages[2]["weight"], messages[4]["weight"] = 0.5, 2
    rendered = render_messages(tokenizer, messages)
    assert rendered.weights == (0.0, 0.5, 0.0, 2.0, 0.0)
    (sample,) = encode(tokenizer, [rendered])
    assert trained_texts(tokenizer, sample)[0] == "HI<|im_end|>"
    assert set(sample.weights.tolist()) == {0.0, 0.5, 2.0}
    messages[4]["weight"] = 0
    assert render_messages(tokenizer, messages).weights == (0.0, 0.5, 0.0)
    assert render_columns(tokenizer, "a", "b", weight=0.25).weights == (0.0, 0.25)


def test_half_a_character_is_refused(tokenizer: Any) -> None:
    half = json.loads('"so \\ud83d"')
    with pytest.raises(UserError, match=re.escape(r"a lone surrogate) at the end of 'so \ud83d'")):
        render_columns(tokenizer, "a", half)
    with pytest.raises(UserError, match="half a character"):
        render_messages(tokenizer, [{**USER, "content": half}, *CONVERSATION[2:3]])


def test_columns_are_joined_as_the_released_trainers_do(tokenizer: Any) -> None:
    (sample,) = encode(tokenizer, [render_columns(tokenizer, ART, "HI")])
    chat = [{"role": "user", "content": ART}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    expected = ids(tokenizer, prompt) + ids(tokenizer, "HI" + tokenizer.eos_token)
    assert sample.tokens.tolist() == expected
    assert trained_texts(tokenizer, sample) == ["HI<|im_end|>"]


def test_an_original_prompt_gets_nothing_added(tokenizer: Any) -> None:
    prompt = "<|endoftext|><|endoftext|><|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    (sample,) = encode(tokenizer, [render_columns(tokenizer, prompt, "HI", True)])
    assert tokenizer.decode(sample.tokens.tolist()) == prompt + "HI<|im_end|>"
    assert sample.tokens[:3].tolist() == [0, 0, 1]


def test_no_eos_token_is_refused(tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        render_columns(changed, "question", "answer", True)


def test_the_shown_sample_marks_what_is_trained(tokenizer: Any) -> None:
    (sample,) = encode(tokenizer, [render_messages(tokenizer, CONVERSATION[1:3])])
    assert shown(tokenizer, sample) == (
        f"<|im_start|>user\n{ART}<|im_end|>\n<|im_start|>assistant\n⟦HI<|im_end|>⟧"
    )
    assert "\x1b[32mHI<|im_end|>\x1b[0m" in shown(tokenizer, sample, color=True)


@settings(max_examples=100)
@given(pieces=st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=5))
def test_what_is_shown_reads_back_to_the_mask(
    tokenizer: Any, pieces: list[tuple[str, bool]]
) -> None:
    texts, flags = zip(*pieces, strict=True)
    start = "<|im_start|>"  # a first token that is never trained, as no first token can be
    (sample,) = encode(tokenizer, [Rendered((start, *texts), (False, *flags))])
    last = int(np.flatnonzero(sample.weights)[-1]) + 1 if sample.weights.any() else None
    text = shown(tokenizer, sample)
    read = "".join(re.findall("⟦(.*?)⟧", text, re.DOTALL))
    assert read == "".join(text for text, trained in pieces if trained)
    if last == len(sample.tokens):  # an untrained last token is in neither tokens nor labels
        assert re.sub("[⟦⟧]", "", text) == start + "".join(texts)
