"""Checksums of files that are whole, and of files that grow."""

import os
import threading
from pathlib import Path

import pytest

from megatron_deft import hashing


def test_hashing_streams_over_block_borders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(bytes(range(256)) * 5)
    whole = hashing.hash_files(tmp_path, ["x"])
    monkeypatch.setattr(hashing, "BLOCK", 100)
    assert hashing.hash_files(tmp_path, ["x"]) == whole
    assert whole["x"]["bytes"] == 1280


def test_hashes_follow_a_file_that_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However unevenly it grows, more slowly or faster than it is hashed; and files beside it."""
    monkeypatch.setattr(hashing, "BLOCK", 100)
    monkeypatch.setattr(hashing, "LAG", 2)
    (tmp_path / "other").write_bytes(b"o" * 250)
    (tmp_path / "empty").write_bytes(b"")
    path, end = tmp_path / "sub" / "x", 0
    path.parent.mkdir()
    with hashing.FollowingHashes(tmp_path) as hashes, open(path, "wb", buffering=0) as handle:
        for length in (30, 170, 1, 999, 0, 100, 7):
            end += handle.write(os.urandom(length))
            hashes.reached(path, end)
        hashes.reached(path, 40)  # a part of it that was read again
        found = hashes.finish(["sub/x", "other", "empty"])
    assert found == hashing.hash_files(tmp_path, ["sub/x", "other", "empty"])
    assert found["sub/x"]["bytes"] == end == 1307


def test_hashing_behind_says_what_went_wrong(tmp_path: Path) -> None:
    with hashing.FollowingHashes(tmp_path) as hashes:
        for _ in range(100):
            hashes.reached(tmp_path / "absent", 10 * hashing.BLOCK)
        with pytest.raises(FileNotFoundError, match="absent"):
            hashes.finish(["absent"])


def test_hashing_behind_ends_with_the_work_it_follows(tmp_path: Path) -> None:
    def interrupted() -> None:
        with hashing.FollowingHashes(tmp_path) as hashes:
            (tmp_path / "x").write_bytes(bytes(100))
            hashes.reached(tmp_path / "x", 100)
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threading.active_count() == before


def test_pieces_reach_from_the_first_byte_of_a_file_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "PIECE", 10)
    monkeypatch.setattr(hashing, "PIECES", 3)
    path = tmp_path / "x"
    told = []
    for length in (30, 100):
        data = os.urandom(length)
        path.write_bytes(data)
        before = hashing.hash_pieces(path)
        for at in range(length):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            if hashing.hash_pieces(path) != before:
                told.append((length, at))
        if length == 30:
            path.write_bytes(data)
            assert before == hashing.hash_file(path)["xxh3_128"]
    assert told == [
        *((30, at) for at in range(30)),
        *((100, at) for at in (*range(10), *range(45, 55), *range(90, 100))),
    ]
