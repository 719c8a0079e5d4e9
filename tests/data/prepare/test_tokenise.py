"""Files become sets: the same bytes whoever makes them, and what is left out is counted."""

import io
import json
import multiprocessing
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_deft.cli import main
from megatron_deft.data.indexed import open_set
from megatron_deft.data.prepare.tokenise import RowSettings, prepare_set
from megatron_deft.errors import UserError
from tests.data.files import chat, contents, write
from tests.data.prepare.sets import DROP, LONGEST, ROWS, hidden


def answers(out: Path, tokenizer: Any) -> list[str]:
    data = open_set(out, tokenizer)
    samples = [data[index] for index in range(len(data))]
    return [tokenizer.decode(s.tokens[s.weights > 0].tolist()) for s in samples]


def test_a_set_of_conversations(
    tmp_path: Path, tiny_folder: Path, tokenizer: Any, file: str, small_tasks: None
) -> None:
    out = tmp_path / "set"
    manifest = prepare_set(out, [file], tiny_folder, DROP)
    assert manifest == open_set(out).manifest
    made = answers(out, tokenizer)
    everything = [row["messages"][1]["content"] + "<|im_end|>" for row in ROWS]
    assert 0 < len(made) < len(everything)
    assert made == [answer for answer in everything if answer in made]
    dropped = manifest["dropped"]["too long"]
    assert len(made) + dropped["count"] == len(ROWS)
    first = next(n for n, answer in enumerate(everything, 1) if answer not in made)
    assert dropped["places"][0] == f"{file} line {first}"
    assert len(dropped["places"]) == 5
    assert manifest["longest"] <= LONGEST
    assert manifest["template"]["text"] == tokenizer.chat_template
    assert (manifest["kind"], manifest["weight_dtype"]) == ("sft", "uint8")
    assert manifest["sources"][0]["bytes"] == os.path.getsize(file)
    assert hidden(tmp_path) == []


def test_the_same_bytes_from_two_processes(
    tmp_path: Path, tiny_folder: Path, file: str, small_tasks: None
) -> None:
    before = set(multiprocessing.active_children())  # of other tests
    more = write(tmp_path / "b.parquet", ROWS[:50], row_group_size=20)
    files = [file, more, file]
    for workers in (1, 2):
        prepare_set(tmp_path / f"{workers}", files, tiny_folder, DROP, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert hidden(tmp_path) == []
    assert not set(multiprocessing.active_children()) - before


def test_a_full_disk(
    tmp_path: Path, tiny_folder: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"its disk has 0\.00 GB left"):
        prepare_set(tmp_path / "set", [file], tiny_folder, DROP)


def test_what_is_there_is_not_replaced_unasked(
    tmp_path: Path, tiny_folder: Path, file: str
) -> None:
    out = tmp_path / "set"
    prepare_set(out, [file], tiny_folder, DROP)
    before = contents(out)
    with pytest.raises(UserError, match=r"exists already: remove it.*--overwrite"):
        prepare_set(out, [file], tiny_folder)
    assert contents(out) == before
    assert prepare_set(out, [file], tiny_folder, overwrite=True)["samples"] == len(ROWS)
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "x").write_text("years of work")
    with pytest.raises(UserError, match="is no prepared set, so it is not replaced"):
        prepare_set(thesis, [file], tiny_folder, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        prepare_set(thesis / "x", [file], tiny_folder, overwrite=True)
    assert hidden(tmp_path) == []


def test_truncation(tmp_path: Path, tiny_folder: Path, tokenizer: Any) -> None:
    rows = [chat("q", "a"), chat("q", "b" * 50), chat("q" * 50, "a")]
    file = write(tmp_path / "a.jsonl", rows)
    whole = prepare_set(tmp_path / "whole", [file], tiny_folder)
    assert (whole["samples"], whole["max_length"], whole["dropped"]) == (3, None, {})
    cut = prepare_set(tmp_path / "cut", [file], tiny_folder, RowSettings(max_length=40))
    assert cut["longest"] == 40
    assert cut["cut"] == {"count": 1, "places": [f"{file} line 2"]}
    assert cut["dropped"] == {
        "no trained token within max_length": {"count": 1, "places": [f"{file} line 3"]}
    }
    longer = open_set(tmp_path / "whole")[1]
    assert np.array_equal(open_set(tmp_path / "cut")[1].tokens, longer.tokens[:40])
    settings = RowSettings(max_length=40, truncation="drop")
    drop = prepare_set(tmp_path / "drop", [file], tiny_folder, settings)
    assert {why: what["count"] for why, what in drop["dropped"].items()} == {"too long": 2}
    settings = RowSettings(max_length=40, truncation="error", bad_rows="drop")
    with pytest.raises(UserError, match=r"line 2: \d+ tokens, more than max_length=40: raise"):
        prepare_set(tmp_path / "error", [file], tiny_folder, settings)
    settings = RowSettings(max_length=3, truncation="drop")
    with pytest.raises(UserError, match="no sample is left to train on: 3 too long"):
        prepare_set(tmp_path / "none", [file], tiny_folder, settings)


def test_weights_are_kept(tmp_path: Path, tiny_folder: Path, small_tasks: None) -> None:
    rows = [chat("q", "a") for _ in range(40)]
    rows[25] = chat("q", "a", weight=0.25)
    manifest = prepare_set(tmp_path / "set", [write(tmp_path / "a.jsonl", rows)], tiny_folder)
    assert manifest["weight_dtype"] == "float32"
    data = open_set(tmp_path / "set")
    assert sorted(set(data[25].weights.tolist())) == [0, 0.25]
    assert sorted(set(data[24].weights.tolist())) == [0, 1]


def test_documents(tmp_path: Path, tiny_folder: Path, tokenizer: Any, small_tasks: None) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    rows = [{"body": f"text {n} " * (n % 7 + 1), "id": n} for n in range(100)]
    file = write(tmp_path / "a.parquet", rows, row_group_size=30)
    manifest = prepare_set(
        tmp_path / "set", [file], tiny_folder, RowSettings(format="text", text_key="body")
    )
    assert (manifest["kind"], manifest["weight_dtype"]) == ("pretrain", None)
    assert manifest["trained_tokens"] == manifest["tokens"]
    assert manifest["template"] is None
    assert not (tmp_path / "set" / "weights.bin").exists()
    theirs = IndexedDataset(str(tmp_path / "set" / "tokens"))
    assert len(theirs.document_indices) == len(rows) + 1
    for index, row in enumerate(rows):
        ids = tokenizer(row["body"], add_special_tokens=False)["input_ids"]
        assert theirs[index].tolist() == [*ids, tokenizer.eos_token_id]
    tokenizer.chat_template = tokenizer.chat_template  # opens whatever the template
    assert open_set(tmp_path / "set", tokenizer)[0].weights.all()


def test_the_template_that_was_named_comes_along(tmp_path: Path, tiny_folder: Path) -> None:
    from transformers import AutoTokenizer

    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    file = write(tmp_path / "a.jsonl", ROWS[:4])
    settings = RowSettings(template=str(template))
    manifest = prepare_set(tmp_path / "set", [file], tiny_folder, settings)
    assert manifest["template"]["text"] == template.read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "set" / "tokenizer")
    assert tokenizer.chat_template == template.read_text()
    data = open_set(tmp_path / "set", tokenizer)
    assert tokenizer.decode(data[0].tokens.tolist()).startswith("user: what is 0 plus 0?<|im_end|>")
    with pytest.raises(UserError, match="another chat template"):
        open_set(tmp_path / "set", AutoTokenizer.from_pretrained(tiny_folder))


def without(name: str, folder: Path, tiny: Path) -> Path:
    shutil.copytree(tiny, folder)
    config = folder / "tokenizer_config.json"
    content = json.loads(config.read_text())
    del content[name]
    config.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("lacking", "settings", "message"),
    [
        ("chat_template", {}, "has no chat template: name one (data.template (--template))"),
        ("eos_token", {"format": "text", "text_key": "messages"}, "has no eos_token"),
    ],
)
def test_a_tokenizer_that_lacks_what_is_needed(
    tmp_path: Path, tiny_folder: Path, file: str, lacking: str, settings: Any, message: str
) -> None:
    folder = without(lacking, tmp_path / "hf", tiny_folder)
    cfg = RowSettings(bad_rows="drop", **settings)  # no row is to blame
    with pytest.raises(UserError, match=re.escape(message)):
        prepare_set(tmp_path / "set", [file], folder, cfg)


def test_original_prompts_need_no_template(tmp_path: Path, tiny_folder: Path) -> None:
    folder = without("chat_template", tmp_path / "hf", tiny_folder)
    file = write(tmp_path / "a.jsonl", [{"p": "one ", "r": "two"}])
    settings = RowSettings(
        prompt_key="p", response_key="r", prompt_dict_keys=(), response_dict_keys=(),
        use_original_prompt=True,
    )  # fmt: skip
    assert prepare_set(tmp_path / "set", [file], folder, settings)["template"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "x"}, "format=x: one of auto, columns, messages, text"),
        ({"truncation": "left"}, "truncation=left: one of right, drop, error"),
        ({"bad_rows": "keep"}, "bad_rows=keep: one of error, drop"),
        ({"max_length": 0}, "max_length=0: at least 1"),
        ({"limit": -1}, "limit=-1: at least 1"),
        ({"format": "text", "max_length": 9}, "max_length is not for format text"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        RowSettings(**settings)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(
    tmp_path: Path, tiny_folder: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream, progress, expected in (
        (Terminal(), True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),  # a log file is no place for one
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        prepare_set(tmp_path / "set", [file], tiny_folder, overwrite=True, progress=progress)
        assert ("tokenising: 100%" in stream.getvalue()) is expected
        assert (f"samples={len(ROWS)}" in stream.getvalue()) is expected


def test_the_command(
    tmp_path: Path, tiny_folder: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"q": {"text": f"what {n}"}, "a": f"this {n}"} for n in range(9)]
    file = write(tmp_path / "a.jsonl", rows)
    out = tmp_path / "set"
    command = ["prepare", "chat", str(out), file, "--tokenizer", str(tiny_folder)]
    columns = ["--prompt-key", "q", "--prompt-dict-keys", "text", "--response-key", "a"]
    assert main([*command, *columns, "--limit", "4", "--workers", "1"]) == 0
    assert answers(out, tokenizer) == [f"this {n}<|im_end|>" for n in range(4)]
    assert f"{out}: 4 samples (sft)" in capsys.readouterr().out
    assert main([*command, "--prompt-key", "q", "--response-key", "a", "--overwrite"]) == 2
    assert "q: expected text, got dict with text: set data.prompt_dict_keys" in (
        capsys.readouterr().err
    )
    assert main(["prepare", "pretrain", str(tmp_path / "p"), file, "--tokenizer",
                 str(tiny_folder), "--text-key", "a"]) == 0  # fmt: skip
    assert "9 samples (pretrain)" in capsys.readouterr().out


def test_a_prompt_column_that_is_named_is_meant(
    tmp_path: Path, tiny_folder: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", [chat("no", "no") | {"q": "what", "a": "this"}])
    out = tmp_path / "set"
    command = ["prepare", "chat", str(out), file, "--tokenizer", str(tiny_folder), "--workers", "1"]
    assert main([*command, "--prompt-key", "q"]) == 2
    assert "no column extra_info" in capsys.readouterr().err
    columns = ["--prompt-key", "q", "--response-key", "a"]
    assert main([*command, *columns, "--format", "messages"]) == 2
    assert "are for --format columns, not messages" in capsys.readouterr().err
    assert main([*command, *columns]) == 0
    assert answers(out, tokenizer) == ["this<|im_end|>"]


def test_more_workers_than_work_and_none(tmp_path: Path, tiny_folder: Path, file: str) -> None:
    with pytest.raises(UserError, match="workers=0: at least 1"):
        prepare_set(tmp_path / "set", [file], tiny_folder, workers=0)
    with pytest.raises(UserError, match="no data files"):
        prepare_set(tmp_path / "set", [], tiny_folder)
    with pytest.raises(UserError, match="hf is not a folder: name the model's"):
        prepare_set(tmp_path / "set", [file], tmp_path / "hf")
    assert prepare_set(tmp_path / "set", [file], tiny_folder, workers=50)["samples"] == len(ROWS)
