"""How rows are read and what becomes of them: the settings of a prepared set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_deft.errors import UserError

FORMATS = ("auto", "columns", "messages", "text")
TRUNCATIONS = ("right", "drop", "error")
POLICIES = ("error", "drop")
_LEGAL = {"format": FORMATS, "truncation": TRUNCATIONS, "bad_rows": POLICIES}


@dataclass(frozen=True)
class RowSettings:
    """What is read of each row and how. Errors: UserError for a value that is none.

    format: "columns" (a prompt and its response), "messages" (a conversation), "text" (documents
        for pretraining, each followed by eos); "auto" is one of the first two, by the columns.
    prompt_key, response_key, prompt_dict_keys, response_dict_keys: of "columns": the columns, and
        keys to follow inside them.
    use_original_prompt: of "columns": the prompt is whole as it is, no chat template is applied.
    messages_key, tools_key: of "messages": the columns; tools may be absent.
    text_key: of "text": the column.
    max_length: longest sample in tokens; None: no limit. Not for "text", which is never cut here.
    truncation: what a longer sample meets with: cut at its end, left out, or an error.
    bad_rows: whether a row that cannot be used is an error, or left out and counted.
    template: chat template in place of the tokenizer's own: a name or a file.
    limit: only the first so many rows.
    """

    format: str = "auto"
    prompt_key: str = "extra_info"
    response_key: str = "extra_info"
    prompt_dict_keys: tuple[str, ...] = ("question",)
    response_dict_keys: tuple[str, ...] = ("answer",)
    messages_key: str = "messages"
    tools_key: str = "tools"
    text_key: str = "text"
    use_original_prompt: bool = False
    max_length: int | None = None
    truncation: str = "right"
    bad_rows: str = "error"
    template: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, legal in _LEGAL.items():
            if getattr(self, name) not in legal:
                raise UserError(f"{name}={getattr(self, name)}: one of {', '.join(legal)}")
        for name in ("max_length", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: at least 1, or leave it out for no limit")
        if self.format == "text":
            for name in ("max_length", "template"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{name} is not for format text: documents are whole, training cuts them"
                    )


def columns_of(settings: RowSettings, form: str) -> tuple[list[str], list[str]]:
    """The columns that a row must have under the format `form`, and those it may have."""
    if form == "columns":
        return sorted({settings.prompt_key, settings.response_key}), []
    if form == "messages":
        return [settings.messages_key], [settings.tools_key]
    return [settings.text_key], []


def uses_template(settings: RowSettings, form: str) -> bool:
    """Whether samples go through the chat template."""
    return form == "messages" or (form == "columns" and not settings.use_original_prompt)


def text_at(row: Mapping[str, Any], column: str, keys: Sequence[str], option: str) -> str:
    """row[column][key][key]...; a list of one stands for its item, as in the released trainers.

    Errors: UserError when that is no text, saying what is there and to set `option`.
    """
    value, place = row[column], column
    for key in keys:
        while isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None:
            raise UserError(f"{place} is null")
        if not isinstance(value, Mapping):
            raise UserError(
                f"{place}: expected an object with {key}, got {type(value).__name__}: set {option}"
            )
        if key not in value:
            raise UserError(f"{place}: no {key}, it has {', '.join(value)}: set {option}")
        value, place = value[key], f"{place}.{key}"
    if value is None:
        raise UserError(f"{place} is null")
    if not isinstance(value, str):
        found = f"{place}: expected text, got {type(value).__name__}"
        if isinstance(value, Mapping):
            raise UserError(f"{found} with {', '.join(value)}: set {option}")
        raise UserError(f"{found}: write it as text, or name another column")
    return value
