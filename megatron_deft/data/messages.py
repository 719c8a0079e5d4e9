"""Whether a conversation is one: its roles and their order, its contents, weights and tool calls.

A template is code of somebody else: what it does with two user turns in a row, or with a tool's
answer that nobody asked for, is anybody's guess. So these are errors before it sees them.

None is the same as absent at every depth, because parquet writes it for absent keys. A JSON text
(of `tools`, or of a call's arguments) is read as it stands, nulls too.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_deft.errors import UserError

_HEAD = (None, "system", "developer")
_FOLLOWS: dict[str, tuple[str | None, ...]] = {  # a role -> those it may follow (None: the start)
    "system": _HEAD,
    "developer": _HEAD,
    "user": (*_HEAD, "assistant", "tool"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
_AT_THE_START = "system and developer messages stand at the beginning, and then a user message"
_RULES = {  # a role -> what to say where it stands wrongly
    "system": _AT_THE_START,
    "developer": _AT_THE_START,
    "user": "one user message at a time: join the two, or put the assistant's turn between them",
    "assistant": "an assistant turn follows a user or a tool message: join two turns into one",
    "tool": "a tool message follows an assistant turn with tool_calls, or another tool message",
}
# What a turn's thoughts are called; templates read the first or the second, as transformers 5 does.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_LARGEST = 3.4e38  # what float32 holds, about


class Conversation(NamedTuple):
    """Messages as a template reads them, and the weight of each (0: not trained)."""

    messages: list[dict[str, Any]]
    weights: list[float]


class _Arguments(dict[str, Any]):
    """Arguments of a call that are an object to a template, and JSON where it wants their text.

    Half of the templates write `arguments | tojson`, the others add `arguments` to a text.
    """

    def __init__(self, value: Mapping[str, Any], text: str) -> None:
        super().__init__(value)
        self._text = text  # underscored: hidden from a template, where `.text` is an argument

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


def read_conversation(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Check `messages` and take what is ours (`train`, `weight`) out of them.

    An assistant turn has its `weight` (1 if absent), and 0 with `train: false`. Tool calls become
    `{"type": "function", "function": {"name", "arguments"}}`, whichever usual form they had.

    Errors: UserError, one line that names messages[i] and what is legal.
    """
    if not isinstance(messages, list | tuple):
        raise UserError(f"messages: expected a list of messages, got {_kind(messages)}")
    if not messages:
        raise UserError("messages: the list is empty: expected a user and an assistant message")
    clean, weights = [], []
    previous: str | None = None
    calls = False  # whether the last assistant turn had any
    for index, message in enumerate(messages):
        read = _message(index, message)
        role = read["role"]
        if previous not in _FOLLOWS[role] or (role == "tool" and not calls):
            raise UserError(f"messages[{index}]: {role} {_after(previous)}: {_RULES[role]}")
        if role != "tool":
            calls = "tool_calls" in read
        previous = role
        clean.append(read)
        weights.append(_weight(index, message))
    return Conversation(clean, weights)


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The JSON schemas of the tools, from a list of objects or the JSON text of one; None if empty.

    Errors: UserError when it is neither.
    """
    tools = _from_json("tools", tools) if isinstance(tools, str) else _without_nulls(tools)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise UserError(f"tools: expected a list of JSON schemas, got {_kind(tools)}")
    read = [
        _from_json(f"tools[{index}]", tool) if isinstance(tool, str) else tool
        for index, tool in enumerate(tools)
    ]
    for index, tool in enumerate(read):
        if not isinstance(tool, dict):
            raise UserError(f"tools[{index}]: expected a JSON schema (an object), got {tool!r:.80}")
    return read


def _message(index: int, message: Any) -> dict[str, Any]:
    if type(message) is dict and len(message) == 2:  # as nearly all are
        role, content = message.get("role"), message.get("content")
        if isinstance(role, str) and role in _FOLLOWS and isinstance(content, str):
            return message.copy()
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        hint = ""
        if isinstance(message, Mapping) and {"from", "value"} <= set(message):
            hint = ": ShareGPT's `from` and `value` are `role` (user, assistant) and `content` here"
        raise UserError(f"{where}: expected an object with `role`, got {message!r:.80}{hint}")
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    if role not in _FOLLOWS:
        raise UserError(f"{where}.role: {role!r:.40} is none of {', '.join(_FOLLOWS)}")
    if calls and role != "assistant":
        raise UserError(f"{where}.tool_calls: only assistant turns call tools, not {role}")
    if not isinstance(content, str) and (content is not None or not calls):
        also = ", or tool_calls" if role == "assistant" else ""
        raise UserError(f"{where}.content: expected a string{also}, got {_kind(content)}")
    clean = {
        key: value if isinstance(value, str) else _without_nulls(value)
        for key, value in message.items()
        if value is not None and key not in ("train", "weight", "tool_calls")
    }
    if calls:
        clean["tool_calls"] = _calls(f"{where}.tool_calls", calls)
    thoughts = next((clean[key] for key in _THOUGHTS if key in clean), None)
    if thoughts is not None:
        clean = {"thinking": thoughts, **clean, "reasoning_content": thoughts}
    return clean


def _weight(index: int, message: Mapping[str, Any]) -> float:
    train, weight = message.get("train"), message.get("weight")
    if train is None and weight is None:
        return 1.0 if message["role"] == "assistant" else 0.0
    where = f"messages[{index}]"
    if train is not None and not isinstance(train, bool):
        raise UserError(f"{where}.train: expected true or false, got {train!r:.40}")
    if weight is not None and not (
        isinstance(weight, int | float)
        and not isinstance(weight, bool)
        and 0 <= weight <= _LARGEST  # NaN is neither
    ):
        raise UserError(f"{where}.weight: expected a finite number >= 0, got {weight!r:.40}")
    if message["role"] != "assistant":
        for key in ("train", "weight"):
            if message.get(key):
                raise UserError(f"{where}.{key}: only assistant turns can be trained")
        return 0.0
    return 0.0 if train is False else 1.0 if weight is None else float(weight)


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise UserError(f"{where}: expected a list of calls, got {_kind(calls)}")
    return [_call(f"{where}[{index}]", call) for index, call in enumerate(calls)]


def _call(where: str, call: Any) -> dict[str, Any]:
    call = _without_nulls(call)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(
            f"{where}: expected an object with `name` and `arguments`, got {call!r:.80}"
        )
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        text = arguments
        arguments = _from_json(f"{where}.arguments", text)
    else:
        text = json.dumps(arguments, ensure_ascii=False, default=str)
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}.arguments: expected an object, got {_kind(arguments)}")
    outer = {key: value for key, value in call.items() if key not in ("name", "arguments")}
    inner = {"name": function["name"], "arguments": _Arguments(arguments, text)}
    return {"type": "function", **outer, "function": inner}


def _from_json(where: str, text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}): {text!r:.80}") from error


def _without_nulls(value: Any) -> Any:
    """`value` without the None that parquet puts where one object of a column lacks a key."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(item) for item in value]
    return value


def _after(previous: str | None) -> str:
    return f"follows {previous}" if previous else "is the first message"


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
