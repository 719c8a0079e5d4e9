"""Sets on disk: megatron-core reads them, opening maps them, damage and mix-ups are told."""

import errno
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_deft.data import indexed
from megatron_deft.data.indexed import (
    Block,
    TokenSet,
    damaged_files,
    open_set,
    require_whole,
    token_dtype,
    write_set,
)
from megatron_deft.data.tokenizer import template_hash, template_text, tokenizer_hash
from megatron_deft.errors import UserError
from megatron_deft.hashing import SEAL
from tests.data.conftest import CHATML, PLAIN

LENGTHS = ([3, 1, 5], [], [2, 70_000])


def blocks(dtype: str, weights: str | None) -> Iterator[Block]:
    rng = np.random.default_rng(1)
    for lengths in LENGTHS:
        n = sum(lengths)
        high = 60_000 if dtype == "uint16" else 2**31 - 1
        marks = rng.integers(0, 2, n) if weights == "uint8" else rng.random(n)
        yield Block(
            np.array(lengths, np.int32),
            rng.integers(0, high, n).astype(dtype),
            None if weights is None else marks.astype(weights),
        )


def about(tokenizer: Any = None) -> dict[str, Any]:
    made = {"hash": tokenizer and tokenizer_hash(tokenizer), "name": "hf/made"}
    text = tokenizer and template_text(tokenizer)
    template = text and {"hash": template_hash(text), "name": "its own", "text": text}
    return {"kind": "sft", "tokenizer": made, "template": template}


def make(folder: Path, dtype: str = "uint16", weights: str | None = "uint8", **more: Any) -> Path:
    folder.mkdir()
    write_set(folder, blocks(dtype, weights), (dtype, weights), {**about(), **more})
    return folder


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_megatron_core_reads_it(tmp_path: Path, dtype: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = open_set(make(tmp_path / "set", dtype))
    theirs = IndexedDataset(str(tmp_path / "set" / "tokens"))
    assert len(theirs) == len(data) == 5
    assert theirs.sequence_lengths.tolist() == data.lengths.tolist() == [3, 1, 5, 2, 70_000]
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert theirs.index.dtype.__name__ == dtype
    for index in range(5):
        assert np.array_equal(theirs[index], data[index].tokens)


@pytest.mark.parametrize("weights", ["uint8", "float32", None])
def test_samples_come_back(tmp_path: Path, weights: str | None) -> None:
    data = open_set(make(tmp_path / "set", "int32", weights))
    (first, _, last) = blocks("int32", weights)
    found = [data[index] for index in range(len(data))]
    assert [len(sample.tokens) for sample in found] == data.lengths.tolist()
    assert np.array_equal(np.concatenate([s.tokens for s in found[:3]]), first.tokens)
    expected = np.ones(9) if first.weights is None else first.weights
    assert np.array_equal(np.concatenate([s.weights for s in found[:3]]), expected)
    assert np.array_equal(data[4].tokens, last.tokens[2:])
    assert (found[0].tokens.dtype, found[0].weights.dtype) == (np.int32, np.float32)
    assert data.lengths.dtype == np.int32
    assert type(found[0].tokens) is np.ndarray
    found[0].tokens[:] = 7  # a copy: the file stays as it is
    assert np.array_equal(data[0].tokens, first.tokens[:3])


def test_the_manifest_counts(tmp_path: Path) -> None:
    manifest = open_set(make(tmp_path / "set")).manifest
    samples = [open_set(tmp_path / "set")[index] for index in range(5)]
    assert manifest["samples"] == 5
    assert manifest["tokens"] == sum(len(s.tokens) for s in samples) == 70_011
    assert manifest["trained_tokens"] == sum(int(s.weights[1:].sum()) for s in samples)
    assert manifest["longest"] == 70_000
    for name, made in manifest["files"].items():
        assert (tmp_path / "set" / name).stat().st_size == made["bytes"]


def test_a_worker_gets_the_path_alone(tmp_path: Path) -> None:
    data = open_set(make(tmp_path / "set"))
    sent = pickle.dumps(data)
    assert len(sent) < 500
    again = pickle.loads(sent)
    assert isinstance(again, TokenSet)
    assert np.array_equal(again[4].tokens, data[4].tokens)


def test_opening_copies_nothing(tmp_path: Path) -> None:
    data = open_set(make(tmp_path / "set"))
    assert not data.lengths.flags.owndata
    assert not data.lengths.flags.writeable


def test_there_is_no_sample_beyond_the_last(tmp_path: Path) -> None:
    data = open_set(make(tmp_path / "set"))
    for index in (5, -1):
        with pytest.raises(IndexError, match=f"sample {index} of 5"):
            data[index]


def test_ids_take_two_bytes_where_they_fit() -> None:
    from megatron.core.datasets.indexed_dataset import DType

    for size in (300, 65_499, 65_500, 152_000):
        assert token_dtype(size) == DType.optimal_dtype(size).__name__


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap_index(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:18] + b"\x06" + whole[19:])


def change(key: str, value: Any) -> Callable[[Path], None]:
    """Of a set from before manifests had a checksum of their own."""

    def edit(path: Path) -> None:
        content = {**json.loads(path.read_text()), key: value}
        content.pop(SEAL)
        path.write_text(json.dumps(content))

    return edit


def other_count(path: Path) -> None:
    text = path.read_text()
    assert '"trained_tokens": 3' in text
    path.write_text(text.replace('"trained_tokens": 3', '"trained_tokens": 2'))


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("tokens.bin", shorten, "tokens.bin is damaged: it has 140021 bytes, the manifest says"),
        ("weights.bin", shorten, "weights.bin is damaged: it has 70010 bytes"),
        ("tokens.idx", shorten, "tokens.idx is damaged: it has 141 bytes"),
        ("tokens.idx", swap_index, "tokens.idx is damaged: it is of another set"),
        ("tokens.bin", Path.unlink, "tokens.bin is damaged: it is missing"),
        ("weights.bin", Path.unlink, "weights.bin is damaged: it is missing"),
        ("manifest.json", Path.unlink, "is no prepared set, it has no manifest.json"),
        ("manifest.json", shorten, "is not readable JSON"),
        ("manifest.json", other_count, "is damaged: it does not match its own checksum"),
        ("manifest.json", change("files", {"tokens.bin": {"bytes": 1}}), "is damaged (files)"),
        ("manifest.json", change("weight_dtype", "int1"), "is damaged (weight_dtype)"),
        ("manifest.json", change("format", "x"), "is not that of a prepared set"),
        ("manifest.json", change("version", 2), "version 2, this program reads 1"),
        ("manifest.json", change("samples", "5"), "is damaged (samples)"),
        ("manifest.json", change("kind", "x"), "is damaged (kind)"),
        ("manifest.json", change("template", 3), "is damaged (template)"),
        ("manifest.json", change("token_dtype", None), "is damaged (token_dtype)"),
        ("", shutil.rmtree, "no such folder"),
    ],
)
def test_damage_is_told(
    tmp_path: Path, name: str, harm: Callable[[Path], None], message: str
) -> None:
    folder = make(tmp_path / "set")
    if (folder / name).suffix == ".json" and harm is shorten:
        (folder / name).write_text((folder / name).read_text().rstrip())
    harm(folder / name)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        open_set(folder)
    assert "\n" not in str(error.value)


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_files_that_changed_are_told(tmp_path: Path) -> None:
    """Of the right size all the same: one byte, another set's tokens, an index of other lengths."""
    folder = make(tmp_path / "set")
    require_whole(open_set(folder))
    other = make(tmp_path / "other", weights="float32")
    for name, harm in {
        "tokens.bin": lambda path: flip(path, 70_000),
        "weights.bin": lambda path: path.write_bytes(b"\1" * 70_011),
        "tokens.idx": lambda path: flip(path, 34),  # the length of the first sample
    }.items():
        damaged = tmp_path / name
        shutil.copytree(folder, damaged)
        harm(damaged / name)
        assert damaged_files(open_set(damaged)) == [name]
        message = f"{damaged / name} is damaged: it does not match its checksum: prepare the set ag"
        with pytest.raises(UserError, match=re.escape(message)):
            require_whole(open_set(damaged))
    shutil.copy(other / "tokens.bin", folder / "tokens.bin")
    assert damaged_files(open_set(folder)) == ["tokens.bin"]
    change("pieces", {})(folder / "manifest.json")
    assert damaged_files(open_set(folder)) == ["tokens.bin"], "the whole checksum is enough"


def test_of_large_files_64_mib_are_looked_at(tmp_path: Path) -> None:
    tokens = np.arange(40_000_000, dtype=np.uint16)
    (tmp_path / "set").mkdir()
    block = Block(np.array([len(tokens)], np.int32), tokens, None)
    write_set(tmp_path / "set", [block], ("uint16", None), about())
    path = tmp_path / "set" / "tokens.bin"
    between = 1_100_000  # the second piece begins 1.2 MB into the file
    flip(path, between)
    assert damaged_files(open_set(tmp_path / "set")) == []
    assert damaged_files(open_set(tmp_path / "set"), checksums=True) == ["tokens.bin"]
    flip(path, between)
    assert damaged_files(open_set(tmp_path / "set"), checksums=True) == []
    with open(path, "r+b") as file:
        file.seek(40_000_000)
        file.write(bytes(2_000_000))
    assert damaged_files(open_set(tmp_path / "set")) == ["tokens.bin"]
    change("pieces", {})(tmp_path / "set" / "manifest.json")
    assert damaged_files(open_set(tmp_path / "set")) == [], "an older set has its size alone"


@pytest.mark.parametrize(("dtype", "wrong"), [("uint16", 60_000), ("int32", -1)])
def test_a_token_that_no_tokenizer_has_is_told(tmp_path: Path, dtype: str, wrong: int) -> None:
    made = {"hash": None, "name": "hf/made", "vocab_size": 2**31 if dtype == "int32" else 60_000}
    folder = make(tmp_path / "set", dtype, tokenizer=made)
    path = folder / "tokens.bin"
    tokens = np.fromfile(path, dtype)
    tokens[5] = wrong
    tokens.tofile(path)
    data = open_set(folder)
    assert len(data[0].tokens) == 3
    message = f"{path} is damaged: sample 2 holds token {wrong % 2**32}, its tokenizer has "
    with pytest.raises(UserError, match=re.escape(message)):
        data[2]


def test_a_disk_that_fails_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_set(make(tmp_path / "set"))

    def fail(*_: object) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(indexed, "hash_pieces", fail)
    for look in (lambda: data[0], lambda: damaged_files(data)):
        with pytest.raises(OSError, match="Input/output error") as error:
            look()
        assert error.value.filename == str(tmp_path / "set" / "tokens.bin")


def test_a_sample_out_of_bounds_is_told(tmp_path: Path) -> None:
    folder = make(tmp_path / "set")
    flip(folder / "tokens.idx", 34 + 4 + 3)  # the second length: 1 + 2**24
    with pytest.raises(UserError, match=r"tokens.idx is damaged: sample 1 would be 16777217 tok"):
        open_set(folder)[1]


def test_only_with_the_tokenizer_it_was_made_with(
    tmp_path: Path, tokenizer: Any, llama3_tokenizer: Any, with_template: Callable[..., Any]
) -> None:
    chatml = with_template(CHATML)
    folder = make(tmp_path / "set", **about(chatml))
    assert len(open_set(folder, chatml)) == 5
    with pytest.raises(UserError, match="made with another tokenizer") as error:
        open_set(folder, llama3_tokenizer)
    for text in (tokenizer_hash(chatml), tokenizer_hash(llama3_tokenizer), "prepare it again"):
        assert text in str(error.value)
    with pytest.raises(UserError, match="made with another chat template") as error:
        open_set(folder, with_template(PLAIN))
    assert str(template_hash(PLAIN)) in str(error.value)
    untemplated = make(tmp_path / "other", **{**about(chatml), "template": None})
    assert len(open_set(untemplated, with_template(PLAIN))) == 5
