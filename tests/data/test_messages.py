"""What a conversation may be, and one clear line for what it may not."""

import json
import math
import re
from typing import Any

import pytest

from megatron_deft.data.messages import read_conversation, read_tools
from megatron_deft.errors import UserError

SYSTEM = {"role": "system", "content": "s"}
DEVELOPER = {"role": "developer", "content": "d"}
USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": "a"}
CALLING = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
TOOL = {"role": "tool", "content": "t"}


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ASSISTANT],
        [SYSTEM, DEVELOPER, USER, ASSISTANT, USER],
        [DEVELOPER, USER, CALLING, TOOL, TOOL, ASSISTANT, USER, ASSISTANT],
        [USER, CALLING, TOOL, CALLING, TOOL, USER],
        [USER, CALLING, USER],
    ],
)
def test_legal_orders(messages: list[dict[str, Any]]) -> None:
    assert [m["role"] for m in read_conversation(messages).messages] == [
        m["role"] for m in messages
    ]


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([USER, SYSTEM, ASSISTANT], "messages[1]: system follows user: system and developer"),
        ([USER, ASSISTANT, DEVELOPER], "messages[2]: developer follows assistant"),
        ([ASSISTANT], "messages[0]: assistant is the first message: an assistant turn follows"),
        ([SYSTEM, ASSISTANT], "messages[1]: assistant follows system"),
        ([TOOL], "messages[0]: tool is the first message"),
        ([USER, USER], "messages[1]: user follows user: one user message at a time"),
        ([USER, ASSISTANT, ASSISTANT], "messages[2]: assistant follows assistant"),
        ([USER, TOOL], "messages[1]: tool follows user"),
        ([USER, ASSISTANT, TOOL], "messages[2]: tool follows assistant: a tool message follows an"),
        ([USER, CALLING, TOOL, USER, TOOL], "messages[4]: tool follows user"),
        ([USER, {"role": "bot", "content": ""}], "messages[1].role: 'bot' is none of system, dev"),
        ([{"role": None, "content": ""}], "messages[0]: expected an object with `role`"),
        ([USER, "x"], "messages[1]: expected an object with `role`"),
        ([{"role": "user", "content": None}], "messages[0].content: expected a string, got null"),
        ([{"role": "user"}], "messages[0].content: expected a string, got null"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content: expected a string, got list"),
        (
            [USER, {"role": "assistant", "content": None}],
            "messages[1].content: expected a string, or tool_calls, got null",
        ),
        ([{**USER, "tool_calls": [1]}], "messages[0].tool_calls: only assistant turns call tools"),
        ([USER, {**ASSISTANT, "tool_calls": "f"}], "messages[1].tool_calls: expected a list"),
        ([USER, {**ASSISTANT, "tool_calls": [1]}], "messages[1].tool_calls[0]: expected an object"),
        (
            [USER, {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": "{"}]}],
            "messages[1].tool_calls[0].arguments: not JSON",
        ),
        (
            [USER, {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
            "messages[1].tool_calls[0].arguments: expected an object, got list",
        ),
        ([], "messages: the list is empty"),
        (None, "messages: expected a list of messages, got null"),
        ("hello", "messages: expected a list of messages, got str"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(messages: Any, error: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(error)) as caught:
        read_conversation(messages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({}, 1.0),
        ({"train": None, "weight": None}, 1.0),
        ({"weight": 0.25}, 0.25),
        ({"weight": 3}, 3.0),
        ({"weight": 0}, 0.0),
        ({"train": True, "weight": 2.0}, 2.0),
        ({"train": False, "weight": 2.0}, 0.0),
    ],
)
def test_weights(keys: dict[str, Any], weight: float) -> None:
    read = read_conversation([{**USER, "train": False, "weight": 0}, {**ASSISTANT, **keys}])
    assert read.weights == [0.0, weight]
    assert read.messages == [USER, ASSISTANT], "a template sees neither train nor weight"


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, -0.5, 1e39, 10**400, "1", True])
def test_a_weight_that_is_none_is_named(weight: Any) -> None:
    with pytest.raises(UserError, match=r"^messages\[1\]\.weight: expected a finite number >= 0"):
        read_conversation([USER, {**ASSISTANT, "weight": weight}])


@pytest.mark.parametrize("keys", [{"train": True}, {"weight": 1.0}])
def test_only_assistant_turns_are_trained(keys: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^messages\[0\]\..*: only assistant turns"):
        read_conversation([{**USER, **keys}, ASSISTANT])


ARGUMENTS = {"city": "Köln", "days": None}
NESTED = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}


@pytest.mark.parametrize(
    ("call", "arguments", "text"),
    [
        (NESTED, {"city": "Köln"}, '{"city": "Köln"}'),  # None is absent, as parquet writes it
        (
            {"name": "f", "arguments": json.dumps(ARGUMENTS), "id": "c1"},
            ARGUMENTS,  # as the text says, nulls too
            json.dumps(ARGUMENTS),
        ),
        ({"name": "f", "arguments": None, "id": "c1"}, {}, "{}"),
        ({"name": "f", "arguments": "", "id": "c1"}, {}, "{}"),
    ],
)
def test_calls_have_one_form(call: dict[str, Any], arguments: dict[str, Any], text: str) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    (_, read) = read_conversation([USER, message]).messages
    function = {"name": "f", "arguments": arguments}
    assert read == {
        "role": "assistant",
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    given = read["tool_calls"][0]["function"]["arguments"]
    assert str(given) == given + "" == "" + given == text
    assert json.loads(json.dumps(given)) == arguments


@pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content"])
def test_thoughts_have_the_names_that_templates_read(key: str) -> None:
    (_, read) = read_conversation([USER, {**ASSISTANT, key: "hm"}]).messages
    assert read["thinking"] == read["reasoning_content"] == "hm"


SCHEMA = {"name": "f", "parameters": {"type": "object", "default": None}}


@pytest.mark.parametrize(
    ("tools", "read"),
    [
        (None, None),
        ([], None),
        ("", None),
        ("[]", None),
        ("null", None),
        ([SCHEMA], [{"name": "f", "parameters": {"type": "object"}}]),
        (json.dumps([SCHEMA]), [SCHEMA]),
        ([json.dumps(SCHEMA)], [SCHEMA]),
    ],
)
def test_tools(tools: Any, read: Any) -> None:
    assert read_tools(tools) == read


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ("{", "tools: not JSON"),
        ("{}x", "tools: not JSON"),
        (SCHEMA, "tools: expected a list of JSON schemas, got dict"),
        ([SCHEMA, 3], "tools[1]: expected a JSON schema (an object), got 3"),
        (["[1]"], "tools[0]: expected a JSON schema (an object), got [1]"),
    ],
)
def test_tools_that_are_none_are_named(tools: Any, error: str) -> None:
    with pytest.raises(UserError, match="^" + re.escape(error)):
        read_tools(tools)
