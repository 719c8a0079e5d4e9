"""Sources of rows: files, folders as the Hub has them, and the Hub itself, there or not."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_deft.data.prepare.sources import open_source
from megatron_deft.data.task import RowError
from megatron_deft.errors import UserError
from tests.data.prepare.conftest import MATH_ROWS, NUMINA_ROWS, read, write_jsonl, write_parquet
from tests.data.prepare.hub import fake_hub

NEEDED = {"problems": ("problem", "solution")}


def problems(*names: Path) -> list[str]:
    source = open_source([str(name) for name in names], "prepare math OUT")
    source.require(NEEDED)
    rows = []
    for where, row in source.rows(["problem"], ()):
        if isinstance(row, RowError):
            raise UserError(f"{where}: {row}")
        rows.append(row["problem"])
    assert source.total == len(rows)
    return rows


NUMINA = [row["problem"] for row in NUMINA_ROWS]
MATH = [row["problem"] for row in MATH_ROWS]


def test_several_files_of_several_kinds_in_order(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "b.jsonl", MATH_ROWS)
    second = write_parquet(tmp_path / "a.parquet", NUMINA_ROWS)
    assert problems(first, second) == MATH + NUMINA


def test_of_a_copy_of_a_hub_repository_the_training_part_is_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", MATH_ROWS)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", NUMINA_ROWS[2:])
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", NUMINA_ROWS[:2])
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert problems(tmp_path) == problems(tmp_path / "data") == NUMINA


def test_of_any_other_folder_all_files_are_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", NUMINA_ROWS)
    write_jsonl(tmp_path / "a.jsonl", MATH_ROWS)
    (tmp_path / "README.md").write_text("no data")
    assert problems(tmp_path) == MATH + NUMINA


def empty(path: Path) -> Path:
    path.write_bytes(b"\n")
    return path


def cut(path: Path) -> Path:
    content = write_parquet(path, NUMINA_ROWS).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def broken_line(path: Path, line: bytes) -> Path:
    path.write_bytes(json.dumps(MATH_ROWS[0]).encode() + b"\n" + line + b"\n")
    return path


BAD = {
    "nowhere": ("nowhere.jsonl: no such file or folder$", lambda t: t / "nowhere.jsonl"),
    "another ending": (
        r"the name must end in one of \.parquet, \.jsonl",
        lambda t: empty(t / "a.csv"),
    ),
    "an empty file": (r"e\.jsonl: the file has no rows", lambda t: empty(t / "e.jsonl")),
    "an empty table": (
        r"e\.parquet: the file has no rows", lambda t: write_parquet(t / "e.parquet", []),
    ),
    "half a file": (r"h\.parquet: not a whole parquet file", lambda t: cut(t / "h.parquet")),
    "broken JSON": (r"b\.jsonl line 2: not JSON", lambda t: broken_line(t / "b.jsonl", b'{"a": ')),
    "not UTF-8": (
        r"b\.jsonl line 2: (not JSON|invalid UTF-8)",
        lambda t: broken_line(t / "b.jsonl", b'{"a": "\xff"}'),
    ),
    "no object": (
        r"b\.jsonl line 2: expected a JSON object",
        lambda t: broken_line(t / "b.jsonl", b"[]"),
    ),
    "a later row without the column": (
        r"b\.jsonl line 2: no problem, it has solution",
        lambda t: broken_line(t / "b.jsonl", b'{"solution": "s"}'),
    ),
    "other columns": (
        r"o\.jsonl: it has the columns q, a; needed: problem, solution",
        lambda t: write_jsonl(t / "o.jsonl", [{"q": "", "a": ""}]),
    ),
    "a folder of nothing": ("no parquet or JSONL file in it", lambda t: t),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path: Path, name: str) -> None:
    message, make = BAD[name]
    with pytest.raises(UserError, match=message):
        problems(make(tmp_path))


def test_files_must_have_the_same_columns(tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", MATH_ROWS)
    bad = write_jsonl(tmp_path / "b.jsonl", [{"q": "", "a": ""}])
    with pytest.raises(UserError, match=r"b\.jsonl: it has the columns q, a; needed"):
        problems(good, bad)
    with pytest.raises(UserError, match=r"a\.jsonl: named twice"):
        problems(good, good)
    with pytest.raises(UserError, match="org/set: no such file or folder, and a data set of the"):
        open_source([str(good), "org/set"], "prepare math OUT")


def test_without_datasets_the_package_and_the_local_option_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install datasets, .*prepare math OUT --source FILE"):
        open_source(["org/set"], "prepare math OUT")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(__version__="3.6.0"))
    with pytest.raises(UserError, match=r"org/set: datasets 3.6.0 .*pip install 'datasets>=4'"):
        open_source(["org/set"], "prepare math OUT")


def command(out: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`prepare math` in a process of its own, with an empty cache and no settings of the Hub."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    kept |= {"HF_HOME": str(out.parent / "cache"), **environment}
    return subprocess.run(
        [sys.executable, "-m", "megatron_deft", "prepare", "math", str(out), *more],
        env=kept, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "the Hub is set offline"),
        ({"HF_DATASETS_OFFLINE": "1"}, "the Hub is set offline"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "no network: "),
    ],
)
def test_without_a_network_one_line_names_the_local_option(
    tmp_path: Path, environment: dict[str, str], problem: str
) -> None:
    pytest.importorskip("datasets", reason="pip install 'megatron-deft[hub]'")
    start = time.monotonic()
    done = command(tmp_path / "out", **environment)
    assert time.monotonic() - start < 20, "it tried again and again"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("megatron-deft: error: gaotang/numina-cot-subset-67k: ")
    assert done.stderr.count("\n") == 1
    assert problem in done.stderr
    assert "megatron-deft prepare math OUT --source FILE..." in done.stderr
    assert not list(tmp_path.glob("*out*"))


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    """The real `datasets`, against a server that answers as the Hub does; then from its cache."""
    pytest.importorskip("datasets", reason="pip install 'megatron-deft[hub]'")
    train = write_parquet(tmp_path / "train.parquet", NUMINA_ROWS)
    with fake_hub("org/set", {"data/train-00000-of-00001.parquet": train.read_bytes()}) as hub:
        revision, address = hub
        done = command(tmp_path / "out", "--source", "org/set", HF_ENDPOINT=address)
        assert done.returncode == 0, done.stderr
        unknown = command(tmp_path / "no", "--source", "org/other", HF_ENDPOINT=address)
    assert unknown.returncode == 2
    assert "does not give such a data set (it answers 404): check the name" in unknown.stderr
    rows = read(tmp_path / "out")
    assert [row["extra_info"]["question"] for row in rows] == NUMINA
    assert {row["data_source"] for row in rows} == {"org/set"}
    info = json.loads((tmp_path / "out" / "info.json").read_text())
    assert info["sources"] == [
        {"hub": "org/set", "revision": revision, "split": "train", "rows": len(NUMINA)}
    ]
    # the server is gone
    done = command(tmp_path / "again", "--source", "org/set", HF_ENDPOINT=address)
    assert done.returncode == 0, done.stderr
    assert "what is in the cache of datasets is used" in done.stderr
    assert read(tmp_path / "again") == rows
    assert json.loads((tmp_path / "again" / "info.json").read_text()) == info
