"""Folders made to run something when they are read: each pickle in them is refused, unread."""

import io
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import save as save_plainly
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
)

from megatron_deft import checkpoint_folder
from megatron_deft.convert import nemo
from megatron_deft.convert.pickles import RECIPES, _Refused, _Unpickler, require_safe
from megatron_deft.convert.state import StateReader
from megatron_deft.errors import UserError
from tests.convert.test_nemo import write_nemo
from tests.distributed import run_ranks
from tests.training.ranks import config, train_all
from tests.training.test_trainer import refused

RNG = "rng_state/shard_0.0_1.1"


class Bomb:
    """Pickled, it is a call of os.system."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._mark}",)


def edit(state: Path, change: Callable[[Metadata], Any]) -> None:
    metadata = FileSystemReader(state).read_metadata()
    change(metadata)
    (state / ".metadata").write_bytes(pickle.dumps(metadata))


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def add_record(state: Path, key: str, value: Any, **place: Any) -> None:
    """A byte record, of a value or as torch.save wrote it, in a file of its own."""
    data = value if isinstance(value, bytes) else saved(value)
    name = next(name for i in count(9) if not (state / (name := f"__{i}_0.distcp")).exists())
    size = (state / name).write_bytes(data)

    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo(name, 0, size, **place)

    edit(state, change)


def in_a_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class LoadsBytes:
    """As torch pickles a storage outside of torch.save."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self._data,)


class Attribute:
    """Pickled, what Python 3.11.2 makes of a member of an enumeration."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> Any:
        return getattr, (_MEM_FORMAT_ENCODING, self._name)


EXTRA = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_1"
SYSTEM = f"{os.system.__module__}.system"
# Name -> (what is done to the state folder, file that is named, what is said)
HARM: dict[str, tuple[Callable[[Path, Bomb], Any], str, str]] = {
    "metadata": (
        lambda state, bomb: (state / ".metadata").write_bytes(pickle.dumps(bomb)),
        ".metadata", SYSTEM,
    ),
    "within metadata": (
        lambda state, bomb: edit(state, lambda m: setattr(m, "planner_data", bomb)),
        ".metadata", SYSTEM,
    ),
    "common": (
        lambda state, bomb: torch.save({"a": bomb}, state / "common.pt"), "common.pt", SYSTEM,
    ),
    "generators": (
        lambda state, bomb: add_record(state, RNG, [bomb]), f"__9_0.distcp, record {RNG}", SYSTEM,
    ),
    "extra state": (
        lambda state, bomb: add_record(state, EXTRA, [in_a_tensor(pickle.dumps(bomb))]),
        f"__9_0.distcp, record {EXTRA}", SYSTEM,
    ),
    "within extra state": (
        lambda state, bomb: add_record(
            state, EXTRA, [in_a_tensor(pickle.dumps({"scale": LoadsBytes(saved(bomb))}))]
        ),
        f"__9_0.distcp, record {EXTRA}", SYSTEM,
    ),
    "extra state in a file": (
        lambda state, bomb: add_record(state, EXTRA, [io.BytesIO(saved(bomb))]),
        f"__9_0.distcp, record {EXTRA}", SYSTEM,
    ),
    "an attribute": (
        lambda state, _: edit(state, lambda m: setattr(m, "planner_data", Attribute("mro"))),
        ".metadata", "builtins.getattr",
    ),
    "another form": (
        lambda state, bomb: add_record(state, RNG, [bomb], transform_descriptors=["zstd"]),
        "__9_0.distcp", f"holds {RNG} in a form that is not read",
    ),
    "another place": (
        lambda state, _: edit(state, lambda m: setattr(
            next(iter(m.storage_data.values())), "relative_path", "../../secret"
        )),
        ".metadata", "names ../../secret, which is no file beside it",
    ),
    "no metadata at all": (
        lambda state, _: (state / ".metadata").write_bytes(pickle.dumps({})),
        ".metadata", "is damaged (it is a dict)",
    ),
    "a number too great": (
        lambda state, _: (state / ".metadata").write_bytes(b"\x80\x05\x8d" + b"\xff" * 8),
        ".metadata", "is damaged (BINUNICODE exceeds",
    ),
    "more than memory holds": (
        lambda state, _: (state / ".metadata").write_bytes(b"\x80\x05\x96" + b"\xff" * 7 + b"\x3f"),
        ".metadata", "is damaged (",
    ),
    "a place without a file": (
        lambda state, _: edit(
            state, lambda m: vars(next(iter(m.storage_data.values()))).pop("relative_path")
        ),
        ".metadata", "is damaged ('_StorageInfo' object has no attribute 'relative_path')",
    ),
    "a record without a key": (
        lambda state, _: edit(
            state, lambda m: m.storage_data.update({MetadataIndex(None): _StorageInfo("a", 0, 1)})
        ),
        ".metadata is damaged", "argument of type 'NoneType' is not",
    ),
    "no such file": (
        lambda state, _: edit(state, lambda m: setattr(
            m.storage_data[next(i for i in m.storage_data if i.fqn == RNG)],
            "relative_path", "__7_0.distcp",
        )),
        ".metadata is damaged", "it names __7_0.distcp, which is no file beside it",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, with its checkpoint."""
    folder = tmp_path_factory.mktemp("run") / "run"
    cfg = config(base, folder, **{"train.steps": 1, "train.save_at_end": "true"})
    run_ranks(1, train_all, [cfg])
    return folder


def only_step(run: Path) -> Path:
    return run / "checkpoints" / "step_00000001"


def message_of(act: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("how", HARM)
def test_a_harmful_state_is_refused_by_file_and_name(run: Path, tmp_path: Path, how: str) -> None:
    state, mark = tmp_path / "state", tmp_path / "mark"
    shutil.copytree(only_step(run) / "state", state)
    do, file, said = HARM[how]
    do(state, Bomb(mark))
    message = message_of(lambda: require_safe(state))
    assert message.startswith(f"{state}/{file}")
    assert said in message
    if file == ".metadata":
        assert message_of(lambda: StateReader(state)) == message
    assert not mark.exists()


def test_of_a_recipe_only_its_own_classes_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """BUILD sets the attributes of whatever was found: of `os`, which the module imports."""
    module = ModuleType(RECIPES)
    module.os, module.Format = os, type("Format", (), {"__module__": RECIPES})  # type: ignore
    for name in ("transformer_engine", "transformer_engine.common", RECIPES):
        monkeypatch.setitem(sys.modules, name, module)

    def found(name: str) -> Any:
        data = io.BytesIO(f"c{RECIPES}\n{name}\n.".encode())
        return _Unpickler(data, {}, {"a.b": None}).load()

    assert found("Format") is module.Format
    with pytest.raises(_Refused, match=f"{RECIPES}.os"):
        found("os")


def test_the_harm_is_real(tmp_path: Path) -> None:
    """What is refused here does run where it is not."""
    mark = tmp_path / "mark"
    torch.load(io.BytesIO(saved(Bomb(mark))), weights_only=False)
    assert mark.exists()


def harm(folder: Path, how: str, mark: Path) -> None:
    """As who means harm would: the checksums are right."""
    manifest = checkpoint_folder.read_manifest(folder)
    HARM[how][0](folder / "state", Bomb(mark))
    fields = {key: manifest[key] for key in manifest.keys() - {"format", "files"}}
    checkpoint_folder.write_manifest(folder, **fields)
    assert checkpoint_folder.verify(folder) == []


def test_resuming_loading_and_converting_refuse_it(base: Path, run: Path, tmp_path: Path) -> None:
    mark, resumed, loaded = tmp_path / "mark", tmp_path / "run", tmp_path / "weights"
    shutil.copytree(run, resumed)
    harm(only_step(resumed), "generators", mark)
    cfg = config(base, resumed, **{"train.steps": 2, "train.resume": only_step(resumed)})
    assert f"record {RNG}, asks for {SYSTEM}" in run_ranks(1, refused, cfg)[0]
    shutil.copytree(base / "megatron", loaded)
    harm(loaded, "common", mark)
    cfg = config(base, tmp_path / "new", **{"model.load": loaded})
    assert f"state/common.pt asks for {SYSTEM}" in run_ranks(1, refused, cfg)[0]
    folder = write_nemo(tmp_path / "nemo", base / "megatron")
    HARM["metadata"][0](folder / "weights", Bomb(mark))
    message = message_of(lambda: nemo.import_nemo(folder, tmp_path / "out"))
    assert f"weights/.metadata asks for {SYSTEM}" in message
    assert not mark.exists()


def test_what_is_harmless_is_read(run: Path, base: Path, tmp_path: Path) -> None:
    """Our own states, NeMo's, plain torch's; those of an older numpy or Python; bookkeeping."""
    require_safe(base / "megatron" / "state")
    require_safe(write_nemo(tmp_path / "nemo", base / "megatron") / "weights")
    save_plainly({"a": torch.ones(3), "b": {"c": 1}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    StateReader(tmp_path / "dcp")
    state = tmp_path / "state"
    shutil.copytree(only_step(run) / "state", state)
    require_safe(state)
    add_record(state, EXTRA, [in_a_tensor(pickle.dumps({"scale": torch.ones(2)}))])
    require_safe(state)
    generators = saved([{"numpy": numpy.random.get_state(), "python": (3, (1, 2), None)}])
    add_record(state, RNG, as_older_numpy(generators))
    require_safe(state)
    edit(state, lambda m: setattr(m, "planner_data", Attribute("TORCH_CHANNELS_LAST")))
    require_safe(state)


def as_older_numpy(data: bytes) -> bytes:
    """What torch.save wrote, where numpy is older than 2."""
    buffer, renamed = io.BytesIO(), 0
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            renamed += content.count(b"numpy._core.multiarray")
            new.writestr(name, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert renamed
    return buffer.getvalue()
