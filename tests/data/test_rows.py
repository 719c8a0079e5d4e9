"""Tasks have every row once, wherever files are cut; places name it; bad files are refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_deft.data import jsonl
from megatron_deft.data.rows import cut, place, read_rows, read_task, release
from megatron_deft.data.task import RowError, Task
from megatron_deft.errors import UserError
from tests.data.files import write


def items(tasks: list[Task], *columns: str) -> list[Any]:
    return [item for task in tasks for item in read_task(task, columns)]


def rows(tasks: list[Task], *columns: str) -> list[Any]:
    return [item for item in items(tasks, *columns) if item is not None]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@given(
    texts=st.lists(st.one_of(st.just(""), st.text(max_size=8)), max_size=12),
    ends=st.booleans(),
    size=st.integers(1, 40),
    feed=st.sampled_from(["\n", "\r\n"]),
)
def test_every_line_is_in_one_task_and_knows_its_number(
    scratch: Path, texts: list[str], ends: bool, size: int, feed: str
) -> None:
    lines = [json.dumps({"x": text}) if text else "" for text in texts]
    path = scratch / "a.jsonl"
    path.write_bytes((feed.join(lines) + feed * ends).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "TASK_BYTES", size)
        tasks = cut([str(path)])
    assert [(task.start, task.stop) for task in tasks] == [
        (start, min(start + size, path.stat().st_size))
        for start in range(0, max(path.stat().st_size, 1), size)
    ]
    found = [
        (place(task, index), item["x"])
        for task in tasks
        for index, item in enumerate(read_task(task, ["x"]))
        if item is not None and not isinstance(item, RowError)
    ]
    assert found == [(f"{path} line {n}", text) for n, text in enumerate(texts, 1) if text]
    assert found == [(where, row["x"]) for where, row in read_rows([str(path)], ["x"])]


@pytest.mark.parametrize("group", [1, 3, 7, 100])
def test_parquet_is_cut_within_its_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    made = [{"x": f"{n:02}" * 20, "other": "y" * 1000} for n in range(20)]
    file = write(tmp_path / "a.parquet", made, row_group_size=group, use_dictionary=False)
    monkeypatch.setattr(jsonl, "TASK_BYTES", 200)
    tasks = cut([file], ["x"])
    assert min(group, 2) <= max(task.stop - task.start for task in tasks) <= min(group, 5)
    assert rows(tasks, "x") == [{"x": row["x"]} for row in made]  # and nothing else is read
    assert [place(task, 0) for task in tasks] == [f"{file} row {task.start}" for task in tasks]
    assert [where for where, _ in read_rows([file], ["x"])] == [
        f"{file} row {n}" for n in range(20)
    ]


def test_a_json_file_may_be_one_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [{"x": n} for n in range(50)]
    path = tmp_path / "a.json"
    path.write_text("\ufeff \n" + json.dumps([*made, 3], indent=1))
    monkeypatch.setattr(jsonl, "TASK_BYTES", 300)
    tasks = cut([str(path)])
    assert len(tasks) > 2
    *found, last = rows(tasks, "x")
    assert found == made
    assert isinstance(last, RowError)
    assert place(tasks[-1], tasks[-1].stop - tasks[-1].start - 1) == f"{path} item 50"
    monkeypatch.setattr(jsonl, "_ARRAY_LIMIT", 10)
    release()
    with pytest.raises(UserError, match=r"make it lines first \(jq -c '.\[\]' .*a.json > .*jsonl"):
        cut([str(path)])


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"x": 1}\n{"x": 2}\n')
    assert rows(cut([str(path)]), "x") == [{"x": 1}, {"x": 2}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json"])
@pytest.mark.parametrize("limit", [1, 5, 6, 19, 20, 99])
def test_limit_counts_rows_over_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    monkeypatch.setattr(jsonl, "TASK_BYTES", 40)
    made = [{"x": n} for n in range(10)]
    if name == "a.jsonl":
        made_lines = [line for row in made for line in (row, "")]
        file = write(tmp_path / name, made_lines)
    elif name == "a.json":
        file = str(tmp_path / name)
        Path(file).write_text(json.dumps(made))
    else:
        file = write(tmp_path / name, made, row_group_size=4)
    assert rows(cut([file, file], [], limit), "x") == (made + made)[:limit]


def test_what_is_no_row_is_told_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"x": 1}\n{"x":\n"x"\nnull\n{"y": 1}\n{"x": "\xff"}\n' + b"[" * 100_000)
    found = items(cut([str(path)]), "x")
    assert [getattr(item, "reason", item) for item in found] == [
        {"x": 1},
        "not JSON",
        "not a JSON object",
        "not a JSON object",
        "no column x",
        "invalid UTF-8",
        "not JSON",
    ]
    with pytest.raises(UserError, match="line 2: not JSON") as error:
        list(read_rows([str(path)], ["x"]))
    assert "\n" not in str(error.value)


def test_invalid_utf8_in_parquet_spoils_its_row_alone(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    binary = pa.array([b"a", b"\xff", b"c"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": text}), path)
    first, second, third = rows(cut([str(path)]), "x")
    assert (first, third) == ({"x": "a"}, {"x": "c"})
    assert isinstance(second, RowError)
    assert second.reason == "invalid UTF-8"


def test_damaged_pages_of_a_parquet_file_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, [{"x": f"{n}" * 99} for n in range(99)], compression="snappy")
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 200 + whole[204:])
    with pytest.raises(UserError, match="row group 0: not readable"):
        rows(cut([str(path)], ["x"]), "x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.jsonl", "none.jsonl: no such file"),
        ("a.jsonl.gz", "a.jsonl.gz is packed: unpack it first (gunzip "),
        ("a.jsonl.zst", "is packed: unpack it first (unzstd "),
        ("a.csv", "the name must end in one of .parquet, .jsonl, .json"),
        (".", "is a folder: name its files"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        cut([str(tmp_path / name)])
