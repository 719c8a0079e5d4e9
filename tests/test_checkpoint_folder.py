"""The manifest: damage of every kind is found and named, and the newest whole folder is picked."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_deft import checkpoint_folder as folders
from megatron_deft.errors import UserError
from megatron_deft.hashing import hash_files


def make(path: Path, step: int = 1) -> Path:
    """A folder with files of several sizes, a hidden one and an empty one, and its manifest."""
    (path / "state").mkdir(parents=True)
    (path / "hf").mkdir()
    (path / "state" / "__0_0.distcp").write_bytes(os.urandom(3000))
    (path / "state" / ".metadata").write_bytes(b"m" * 10)
    (path / "hf" / "config.json").write_text("{}")
    (path / "hf" / "empty").write_bytes(b"")
    folders.write_manifest(
        path, kind="training", spec={"family": "llama"}, step=step, objective="deft", base="a/b"
    )
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest = folders.read_manifest(make(tmp_path / "a", step=7))
    assert {k: manifest[k] for k in ("format", "kind", "spec", "step", "objective", "base")} == {
        "format": 2,
        "kind": "training",
        "spec": {"family": "llama"},
        "step": 7,
        "objective": "deft",
        "base": "a/b",
    }
    assert list(manifest["files"]) == [
        "hf/config.json",
        "hf/empty",
        "state/.metadata",
        "state/__0_0.distcp",
    ]
    assert manifest["files"]["state/.metadata"]["bytes"] == 10
    assert folders.verify(tmp_path / "a") == []


def test_ranks_share_the_hashing(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    names = folders.list_files(path)
    shares = [hash_files(path, names[rank::3]) for rank in range(3)]
    merged = {name: value for share in shares for name, value in share.items()}
    assert merged == folders.read_manifest(path)["files"]
    folders.write_manifest(path, kind="weights", spec={}, files=merged)
    assert folders.verify(path) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "is missing"),
        (truncate, "has 2999 bytes instead of 3000"),
        (flip_one_bit, "does not match its checksum"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    path = make(tmp_path / "a")
    damage(path / "state" / "__0_0.distcp")
    assert folders.verify(path) == [f"state/__0_0.distcp {says}" + " checksum" * ("blake" in says)]


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [
        ("hf/chat_template.jinja", True),
        ("hf/additional_chat_templates/tools.jinja", True),
        ("hf/generation_config.json", True),
        ("hf/tokenizer.model", True),
        ("hf/.nfs0001", False),
        ("hf/.DS_Store", False),
        ("hf/additional_chat_templates/.DS_Store", False),
        ("state/.nfs0001", False),
        ("hf/notes.txt", False),
        ("hf/LICENSE", False),
    ],
)
def test_a_file_put_there_later_is_refused_if_it_would_be_read(
    tmp_path: Path, name: str, is_refused: bool
) -> None:
    path = make(tmp_path / "a")
    stray = path / name
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("x")
    assert folders.strays(path) == []  # without a tokenizer of its own it may be given one
    (path / "hf" / "tokenizer.json").write_text("{}")
    stray.unlink()
    folders.write_manifest(path, kind="weights", spec={})
    stray.write_text("x")
    assert folders.verify(path) == []
    assert len(folders.strays(path)) == is_refused
    for line in folders.strays(path):
        assert line.startswith(f"{stray} was put there after the folder was written")
        assert "\n" not in line


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a")

    def fail(path: Path, *_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folders, "hash_file", fail)
    says = "cannot be read (Input/output error)"
    names = folders.list_files(path)
    assert folders.verify(path) == [f"{name} {says}" for name in names]
    assert folders.verify(path, slice(1, None, 2)) == [f"{name} {says}" for name in names[1::2]]
    monkeypatch.setattr(Path, "read_text", fail)
    assert folders.verify(path) == [f"megatron_deft.json {says}"]


def test_a_flipped_digit_of_the_manifest_is_found(tmp_path: Path) -> None:
    """It is still JSON, of legal fields; one without a checksum of its own is from before."""
    path = make(tmp_path / "a", step=16)
    text = (path / folders.MANIFEST).read_text()
    assert folders.SEAL in text
    (path / folders.MANIFEST).write_text(text.replace('"step": 16', '"step": 17'))
    (problem,) = folders.verify(path)
    assert "megatron_deft.json does not match its own checksum" in problem
    before = json.dumps({k: v for k, v in json.loads(text).items() if k != folders.SEAL})
    (path / folders.MANIFEST).write_text(before)
    assert folders.verify(path) == []
    assert folders.read_manifest(path)["step"] == 16


def test_sizes_alone_do_not_see_a_flipped_bit(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    flip_one_bit(path / "state" / "__0_0.distcp")
    assert folders.verify(path, checksums=False) == []
    assert len(folders.verify(path)) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "has no megatron_deft.json"),
        ("{", "not readable JSON"),
        ("[]", "it has no format"),
        ('{"format": 1, "files": {}}', "has format 1, this version reads 2"),
    ],
)
def test_unreadable_manifest(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / folders.MANIFEST).write_text(text)
    with pytest.raises(UserError, match=says):
        folders.read_manifest(tmp_path)
    assert len(folders.verify(tmp_path)) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", None),
        ("kind", "other"),
        ("kind", []),
        ("spec", None),
        ("spec", [1]),
        ("files", None),
        ("files", ["hf/config.json"]),
        ("files", {"hf/config.json": {"xxh3_128": "00"}}),
        ("files", {"hf/config.json": {"bytes": "2", "xxh3_128": "00"}}),
        ("files", {"hf/config.json": {"bytes": 2}}),
        ("files", {"hf/config.json": None}),
        ("step", "7"),
        ("step", True),
        ("config", []),
        ("base", {}),
    ],
)
def test_a_manifest_with_a_field_of_another_form(tmp_path: Path, field: str, value: Any) -> None:
    path = make(tmp_path / "a")
    manifest = folders.read_manifest(path)
    (path / folders.MANIFEST).write_text(json.dumps({**manifest, field: value}))
    with pytest.raises(UserError, match=rf"megatron_deft\.json has no legal {field}: the folder"):
        folders.read_manifest(path)
    assert len(folders.verify(path)) == 1


@pytest.mark.parametrize("field", ["kind", "spec", "files"])
def test_a_manifest_without_what_every_version_wrote(tmp_path: Path, field: str) -> None:
    path = make(tmp_path / "a")
    manifest = folders.read_manifest(path)
    for name in (field, "objective"):
        (path / folders.MANIFEST).write_text(
            json.dumps({k: v for k, v in manifest.items() if k != name})
        )
        if name == "objective":
            assert folders.read_manifest(path).keys() == manifest.keys() - {name}
        else:
            with pytest.raises(UserError, match=f"has no legal {field}: "):
                folders.read_manifest(path)


def test_newest_whole_skips_every_kind_of_damage_and_says_why(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    for step in range(1, 7):
        make(root / folders.step_name(step), step)
    (root / "step_00000006" / folders.MANIFEST).unlink()
    (root / "step_00000005" / "state" / ".metadata").unlink()
    truncate(root / "step_00000004" / "state" / "__0_0.distcp")
    flip_one_bit(root / "step_00000003" / "state" / "__0_0.distcp")
    make(root / ".step_00000007.tmp-4711")
    (root / "notes.txt").write_text("not a checkpoint")
    (root / "step_00000009").write_text("a file")

    for start in (root, tmp_path / "run"):
        path, skipped = folders.newest_whole(start)
        assert path == root / "step_00000002"
        reasons = {p.name: why for p, why in skipped}
        assert list(reasons) == [
            ".step_00000007.tmp-4711",
            "step_00000006",
            "step_00000005",
            "step_00000004",
            "step_00000003",
        ]
        assert "half-written" in reasons[".step_00000007.tmp-4711"]
        assert "no megatron_deft.json" in reasons["step_00000006"]
        assert reasons["step_00000005"] == "state/.metadata is missing"
        assert "2999 bytes instead of 3000" in reasons["step_00000004"]
        assert "checksum" in reasons["step_00000003"]


def test_newest_is_by_number_not_by_name(tmp_path: Path) -> None:
    make(tmp_path / folders.step_name(99_999_999))
    newest = make(tmp_path / folders.step_name(100_000_000))
    assert folders.newest_whole(tmp_path) == (newest, [])
    assert folders.resolve(tmp_path) == newest


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert folders.newest_whole(tmp_path) == (None, [])
    assert folders.newest_whole(tmp_path / "absent") == (None, [])


def test_resolve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = make(tmp_path / "weights")
    root = tmp_path / "run" / "checkpoints"
    first, second = make(root / "step_00000001"), make(root / "step_00000002")
    assert folders.resolve(str(weights)) == weights
    assert folders.resolve(first) == first
    assert folders.resolve(tmp_path / "run") == second, "no `latest`: the highest step"
    folders.write_latest(root, "step_00000001")
    assert (root / "latest").read_text() == "step_00000001\n"
    for start in (tmp_path / "run", root, root / "latest"):
        assert folders.resolve(start) == first
    folders.write_latest(root, "step_00000002")
    assert folders.resolve(tmp_path / "run") == second
    for damaged in (b"\xff\xfe\0bad", b"", b"../checkpoints/step_00000001"):
        (root / "latest").write_bytes(damaged)
        for start in (tmp_path / "run", root / "latest"):
            assert folders.resolve(start) == second
            assert "not the name of a checkpoint; step_00000002 is used" in caplog.text
            caplog.clear()
        assert folders.candidates(root)[1][0][0] == root / "latest"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent", "does not exist"),
        ("empty", "holds neither megatron_deft.json nor checkpoints"),
        ("run/checkpoints/step_00000003/hf/config.json", "is a file"),
        ("run", "step_00000004.*latest names it.*unfinished or gone"),
    ],
)
def test_resolve_errors(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    root = tmp_path / "run" / "checkpoints"
    make(root / "step_00000003")
    folders.write_latest(root, "step_00000004")
    with pytest.raises(UserError, match=says):
        folders.resolve(tmp_path / name)


def test_an_export_knows_the_folder_it_was_made_of(tmp_path: Path) -> None:
    ours, export = make(tmp_path / "ours"), tmp_path / "export"
    export.mkdir()
    assert not folders.is_export_of(export, ours), "nothing is recorded, as by an older version"
    folders.write_source(export, folders.read_manifest(ours))
    assert folders.is_export_of(export, ours)
    ours.rename(tmp_path / "moved")
    assert folders.is_export_of(export, tmp_path / "moved")
    assert not folders.is_export_of(export, make(ours)), "the same name and step, other bytes"
    for text in ("[]", "{", "{}"):
        (export / folders.SOURCE).write_text(text)
        assert not folders.is_export_of(export, ours)


def test_later_steps_are_set_aside(tmp_path: Path) -> None:
    for name in ("step_00000001", "step_00000002", "step_00000003", "step_00000003.abandoned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "was").write_text(name)
    notes = folders.set_aside(tmp_path, 2)
    assert notes == [
        f"{tmp_path}/step_00000003 is not of this run: kept as step_00000003.abandoned-2"
    ]
    left = {path.name: (path / "was").read_text() for path in tmp_path.iterdir()}
    own = {name: name for name in ("step_00000001", "step_00000002")}
    earlier = "step_00000003.abandoned"
    assert left == own | {earlier: earlier, f"{earlier}-2": "step_00000003"}
    assert folders.set_aside(tmp_path / "nowhere", 2) == []


def test_is_a_leaf() -> None:
    """Looking at a folder must not cost an import of torch or megatron."""
    code = "import megatron_deft.checkpoint_folder, sys, json; print(json.dumps(list(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(out.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "megatron", "numpy", "transformers"}
