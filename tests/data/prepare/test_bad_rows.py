"""A row that cannot be used is one clear error, or left out and counted."""

import multiprocessing
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_deft.data.prepare import tokenise
from megatron_deft.data.prepare.tokenise import RowSettings, prepare_set
from megatron_deft.errors import UserError
from tests.data.files import chat, write
from tests.data.prepare.sets import ROWS

BAD: list[tuple[str, Any, str, str]] = [
    # its reason, the row, what the error says, the format
    ("not JSON", '{"messages": [', "not JSON (Expecting value", "messages"),
    ("not a JSON object", "[]", "expected a JSON object, got list", "messages"),
    ("no column messages", {"x": 1}, "no messages, it has x", "messages"),
    ("messages is null", {"messages": None}, "messages is null", "messages"),
    ("messages: expected a list", {"messages": "x"}, "expected a list of messages", "messages"),
    ("messages[N]", {"messages": [3]}, "messages[0]", "messages"),
    ("messages[N]", {"messages": [{"role": "user"}]}, "messages[0]", "messages"),
    ("messages", chat("q", "a", weight=float("nan")), "weight", "messages"),
    ("messages", {"messages": ROWS[0]["messages"][::-1]}, "messages[0]", "messages"),
    ("messages", {"messages": ROWS[0]["messages"][:1]}, "no assistant turn", "messages"),
    ("the text has half", chat("q", "\ud800"), "half a character", "messages"),
    ("p is null", {"p": None, "r": "x"}, "p is null", "columns"),
    ("r is null", {"p": "x", "r": None}, "r is null", "columns"),
    ("p: expected text, got int", {"p": 3, "r": "x"}, "p: expected text, got int", "columns"),
    ("t is null", {"t": None}, "t is null", "text"),
    ("t is empty", {"t": ""}, "t is empty", "text"),
    ("t has half", {"t": "\ud800"}, "t has half a character", "text"),
]


GOOD = {"messages": ROWS[0], "columns": {"p": "one", "r": "two"}, "text": {"t": "three"}}


@pytest.mark.parametrize(("reason", "row", "message", "form"), BAD)
def test_bad_rows(
    tmp_path: Path, tiny_folder: Path, reason: str, row: Any, message: str, form: str
) -> None:
    file = write(tmp_path / "a.jsonl", [GOOD[form], "", row, GOOD[form]])
    keys: dict[str, Any] = {
        "prompt_key": "p", "response_key": "r", "text_key": "t", "prompt_dict_keys": (),
        "response_dict_keys": (), "format": form,
    }  # fmt: skip
    with pytest.raises(UserError, match=re.escape(message)) as error:
        prepare_set(tmp_path / "error", [file], tiny_folder, RowSettings(**keys))
    assert str(error.value).startswith(f"{file} line 3: ")
    assert "data.bad_rows (--bad-rows) drop" in str(error.value)
    assert "\n" not in str(error.value)
    manifest = prepare_set(
        tmp_path / "drop", [file], tiny_folder, RowSettings(**keys, bad_rows="drop")
    )
    assert manifest["samples"] == 2
    ((why, what),) = manifest["dropped"].items()
    assert why.startswith(reason)
    assert what == {"count": 1, "places": [f"{file} line 3"]}


def test_many_reasons_are_counted_together(
    tmp_path: Path, tiny_folder: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise, "_REASONS", 3)
    rows = [
        ROWS[0],
        *({f"k{'x' * n}": n} for n in range(9)),
        "x",
        {"messages": None},
        {"messages": 3},
    ]
    file = write(tmp_path / "a.jsonl", rows)
    manifest = prepare_set(tmp_path / "set", [file], tiny_folder, RowSettings(bad_rows="drop"))
    assert {why: what["count"] for why, what in manifest["dropped"].items()} == {
        "no column messages": 9, "not JSON": 1, "messages is null": 1, "other reasons": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "a.jsonl: the file has no rows"),
        ("a.jsonl", "\n\n", "a.jsonl: the file has no rows"),
        ("a.json", "[]", "a.json: the file has no rows"),
        ("a.json", "[1", "a.json: not a JSON array"),
        ("a.jsonl", "x\n", "a.jsonl line 1: not JSON"),
        ("a.jsonl", '{"x": 1}\n', "no format fits, it has x"),
        ("a.parquet", "", "a.parquet: not a whole parquet file"),
    ],
)
@pytest.mark.parametrize("policy", ["error", "drop"])
def test_files_without_a_usable_row(
    tmp_path: Path, tiny_folder: Path, name: str, text: str, message: str, policy: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        prepare_set(
            tmp_path / "set", [str(tmp_path / name)], tiny_folder, RowSettings(bad_rows=policy)
        )


def test_the_first_bad_row_is_told_whichever_process_was_faster(
    tmp_path: Path, tiny_folder: Path, small_tasks: None
) -> None:
    before = set(multiprocessing.active_children())  # of other tests
    rows: list[Any] = [*ROWS[:30], "bad", *ROWS, "bad"]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match="line 31: not JSON"):
        prepare_set(tmp_path / "set", [file], tiny_folder, workers=2)
    assert not set(multiprocessing.active_children()) - before
