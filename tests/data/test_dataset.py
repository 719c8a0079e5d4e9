"""Real parquet and JSONL files become samples; whatever is wrong with one is named."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megatron_deft.data.dataset import Dataset, collate, load_dataset
from megatron_deft.data.sampler import FILLER
from megatron_deft.data.samples import IGNORE, Encoded
from megatron_deft.errors import UserError
from tests.data.conftest import ART, data_config

ROWS: list[dict[str, Any]] = [
    {"extra_info": {"question": f"{ART}{n}", "answer": answer, "index": n}}
    for n, answer in enumerate(["HI", "HELLO", "X" * 40, "don't"])
]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}
    for answer in ("one", "two", "three")
]


def write(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(tokenizer: Any, data: Dataset) -> list[str]:
    return [tokenizer.decode(data[i].tokens.tolist()) for i in range(len(data))]


def answers(tokenizer: Any, data: Dataset) -> list[str]:
    samples = [data[i] for i in range(len(data))]
    return [tokenizer.decode(s.tokens[s.weights > 0].tolist()) for s in samples]


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.json"])
def test_columns_from_every_kind_of_file(tmp_path: Path, tokenizer: Any, name: str) -> None:
    data = load_dataset(data_config(), [write(tmp_path / name, ROWS)], tokenizer)
    assert (len(data), data.format, data.notes) == (4, "columns", ())
    assert answers(tokenizer, data) == [row["extra_info"]["answer"] + "<|im_end|>" for row in ROWS]
    assert texts(tokenizer, data)[0] == (
        f"<|im_start|>user\n{ART}0<|im_end|>\n<|im_start|>assistant\nHI<|im_end|>"
    )
    assert data.tokens.dtype == np.int32
    assert data.lengths.tolist() == [len(data[i].tokens) - 1 for i in range(4)]


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_messages_from_every_kind_of_file(tmp_path: Path, tokenizer: Any, name: str) -> None:
    chats = [*CHATS, {"messages": [*CHATS[0]["messages"], {"role": "user", "content": "bye"}]}]
    data = load_dataset(data_config(), [write(tmp_path / name, chats)], tokenizer)
    assert data.format == "messages"
    assert answers(tokenizer, data) == [f"{a}<|im_end|>" for a in ("one", "two", "three", "one")]
    assert texts(tokenizer, data)[3].endswith("<|im_start|>user\nbye<|im_end|>\n")


def test_a_parquet_message_without_train_is_the_same_as_one_with_null(
    tmp_path: Path, tokenizer: Any
) -> None:
    first = CHATS[0]["messages"]
    chats = [
        {"messages": first},
        {"messages": [first[0], first[1] | {"train": False}, *first]},
    ]
    data = load_dataset(data_config(), [write(tmp_path / "a.parquet", chats)], tokenizer)
    assert answers(tokenizer, data) == ["one<|im_end|>", "one<|im_end|>"]


def test_several_files_in_order_and_a_limit(tmp_path: Path, tokenizer: Any) -> None:
    files = [write(tmp_path / "a.jsonl", CHATS[:2]), write(tmp_path / "b.parquet", CHATS[2:])]
    data = load_dataset(data_config(), files, tokenizer)
    assert answers(tokenizer, data) == [f"{a}<|im_end|>" for a in ("one", "two", "three")]
    assert len(load_dataset(data_config(), files, tokenizer, limit=2)) == 2


def test_plain_columns_and_lists_of_one(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": [{"content": "Q: "}], "response": "A"}]
    cfg = data_config(
        prompt_key="prompt",
        response_key="response",
        prompt_dict_keys=("content",),
        response_dict_keys=(),
        use_original_prompt=True,
    )
    data = load_dataset(cfg, [write(tmp_path / "a.parquet", rows)], tokenizer)
    assert texts(tokenizer, data) == ["Q: A<|im_end|>"]


def test_more_rows_than_are_tokenised_at_once(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"p": f"{n} ", "r": f"{n * 7}"} for n in range(2500)]
    no_keys: dict[str, Any] = {"prompt_dict_keys": (), "response_dict_keys": ()}
    cfg = data_config(prompt_key="p", response_key="r", use_original_prompt=True, **no_keys)
    data = load_dataset(cfg, [write(tmp_path / "a.parquet", rows)], tokenizer)
    assert texts(tokenizer, data) == [f"{n} {n * 7}<|im_end|>" for n in range(2500)]


def lengths_of(tmp_path: Path, tokenizer: Any) -> tuple[str, list[int], list[int]]:
    """The file of ROWS, each row's tokens and each row's prompt tokens."""
    file = write(tmp_path / "train.parquet", ROWS)
    data = load_dataset(data_config(), [file], tokenizer)
    samples = [data[i] for i in range(len(data))]
    return file, [len(s.tokens) for s in samples], [int((s.weights == 0).sum()) for s in samples]


def test_right_cuts_and_drops_what_has_no_response_left(tmp_path: Path, tokenizer: Any) -> None:
    file, lengths, _ = lengths_of(tmp_path, tokenizer)
    assert lengths[2] > max(lengths[0], lengths[1], lengths[3])
    data = load_dataset(data_config(max_length=lengths[2] - 1), [file], tokenizer)
    assert len(data) == 4
    assert len(data[2].tokens) == lengths[2] - 1
    assert data.notes == (f"1 samples cut to data.max_length={lengths[2] - 1}: {file} row 2",)
    longer = [{"extra_info": {"question": ART * 9, "answer": "HI"}}]
    file = write(tmp_path / "mixed.jsonl", longer + ROWS + longer)
    data = load_dataset(data_config(max_length=max(lengths)), [file], tokenizer)
    assert len(data) == 4
    assert data.notes == (
        f"2 samples left out, no trained token within data.max_length={max(lengths)}: "
        f"{file} line 1, {file} line 6",
    )


def test_a_response_cut_before_its_first_token_is_dropped(tmp_path: Path, tokenizer: Any) -> None:
    file, _, prompts = lengths_of(tmp_path, tokenizer)
    assert len(set(prompts)) == 1
    data = load_dataset(data_config(max_length=prompts[0] + 1), [file], tokenizer)
    assert len(data) == 4
    with pytest.raises(UserError, match=f"no sample is left.*max_length={prompts[0]}: .*row 0"):
        load_dataset(data_config(max_length=prompts[0]), [file], tokenizer)


def test_a_first_token_is_nothing_to_train_on(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "a.jsonl", [{"extra_info": {"question": "", "answer": "HI there"}}])
    with pytest.raises(UserError, match="no sample is left"):
        load_dataset(data_config(use_original_prompt=True, max_length=1), [file], tokenizer)
    data = load_dataset(data_config(use_original_prompt=True, max_length=2), [file], tokenizer)
    assert len(data) == 1


def test_drop_and_error(tmp_path: Path, tokenizer: Any) -> None:
    file, lengths, _ = lengths_of(tmp_path, tokenizer)
    limit = lengths[2] - 1
    data = load_dataset(data_config(max_length=limit, truncation="drop"), [file], tokenizer)
    assert len(data) == 3
    assert "longer than" in data.notes[0]
    assert "row 2" in data.notes[0]
    message = re.escape(f"row 2: {lengths[2]} tokens, more than data.max_length={limit}")
    with pytest.raises(UserError, match=message):
        load_dataset(data_config(max_length=limit, truncation="error"), [file], tokenizer)


BOTH = [CHATS[0] | ROWS[0]]


def test_auto_will_not_guess_between_two_formats(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "both.parquet", BOTH)
    with pytest.raises(UserError, match=r"both formats fit.*set data\.format"):
        load_dataset(data_config(), [file], tokenizer)
    for form in ("columns", "messages"):
        assert load_dataset(data_config(format=form), [file], tokenizer).format == form
    # an original prompt is something that only columns have
    data = load_dataset(data_config(use_original_prompt=True), [file], tokenizer)
    assert data.format == "columns"


@pytest.mark.parametrize(
    ("name", "rows", "changes", "message"),
    [
        ("a.parquet", ROWS, {"format": "messages"}, "no column messages, it has extra_info: set"),
        ("a.jsonl", [{"text": "x"}], {}, "no format fits, it has text"),
        (
            "a.jsonl",
            ROWS,
            {"prompt_dict_keys": ("prompt",)},
            "line 1: extra_info: no prompt, it has",
        ),
        (
            "a.jsonl",
            ROWS,
            {"prompt_dict_keys": ()},
            "expected text, got dict with question, answer",
        ),
        ("a.jsonl", [*ROWS, {"extra_info": "x"}], {}, "line 5: extra_info: expected an object"),
        ("a.jsonl", [*ROWS, {"other": 1}], {}, "line 5: no extra_info, it has other"),
        ("a.jsonl", [*CHATS, {"messages": "x"}], {}, "line 4: messages: expected a list"),
        ("a.parquet", [{"messages": None}, *CHATS], {}, "row 0: messages: expected a list of"),
        ("a.jsonl", [*CHATS, [1]], {}, "line 4: expected a JSON object, got list"),
        (
            "a.jsonl",
            [{"extra_info": {"question": "x", "answer": 3}}],
            {},
            "line 1: extra_info.answer: expected text, got int: set data.response_dict_keys",
        ),
        ("a.txt", ROWS, {}, "must end in one of .parquet, .jsonl, .json"),
        ("a.jsonl", [], {}, "the file has no rows"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path,
    tokenizer: Any,
    name: str,
    rows: list[Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    file = write(tmp_path / name, rows)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_dataset(data_config(**changes), [file], tokenizer)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_empty_and_damaged_files(tmp_path: Path, tokenizer: Any) -> None:
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table({"messages": pa.array([], pa.string())}), empty)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(Path(write(tmp_path / "whole.parquet", ROWS)).read_bytes()[:-20])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(CHATS[0]) + "\n\n" + '{"messages": [')
    for files, message in (
        ([], "no data files"),
        ([str(tmp_path / "none.parquet")], "none.parquet: no such file"),
        ([str(empty)], "empty.parquet: the file has no rows"),
        ([str(cut)], "cut.parquet: not a whole parquet file"),
        ([str(bad)], "bad.jsonl line 3: not JSON"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load_dataset(data_config(), files, tokenizer)


ALL_CONTENTS = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_a_refused_conversation_names_its_row(
    tmp_path: Path, with_template: Callable[..., Any]
) -> None:
    file = write(tmp_path / "a.jsonl", [*CHATS, {"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(UserError, match=re.escape("a.jsonl line 4: messages: no assistant turn")):
        load_dataset(data_config(), [file], with_template(ALL_CONTENTS))


def sample(tokens: list[int], trained: list[bool]) -> Encoded:
    return Encoded(np.array(tokens, np.int32), np.array(trained, np.float32))


def test_collate_shifts_pads_and_masks() -> None:
    batch = collate(
        [
            sample([5, 6, 7, 8], [False, False, True, True]),
            sample([9, 3], [False, True]),
            sample([], []),
        ],
        length=5,
    )
    x = IGNORE
    assert batch["tokens"].tolist() == [[5, 6, 7, 0, 0], [9, 0, 0, 0, 0], [0] * 5]
    assert batch["labels"].tolist() == [[x, 7, 8, x, x], [3, x, x, x, x], [x] * 5]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 3
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert all(tensor.is_contiguous() for tensor in batch.values())


def test_take_knows_filler_and_indexing_does_not(tmp_path: Path, tokenizer: Any) -> None:
    data = load_dataset(data_config(), [write(tmp_path / "a.jsonl", CHATS)], tokenizer)
    assert [len(s.tokens) for s in data.take(np.array([1, FILLER]))] == [len(data[1].tokens), 0]
    for index in (FILLER, len(data)):
        with pytest.raises(IndexError):
            data[index]
