"""Plain files in blocks: what is read and written, and what goes wrong."""

import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_deft.convert import streams
from megatron_deft.convert.safetensors_io import STORED_DTYPES, header_bytes, read_header
from megatron_deft.convert.streams import (
    Output,
    Section,
    bytes_of,
    nothing_follows,
    progress_bar,
    read_into,
)
from megatron_deft.errors import UserError


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK", 7)


@pytest.mark.usefixtures("small_blocks")
def test_written_blocks_come_back_and_their_follower_knows_how_far(tmp_path: Path) -> None:
    path, told = tmp_path / "x", []
    values = torch.arange(50).bfloat16().reshape(5, 10)
    with progress_bar("", 0) as bar, Output(path, lambda p, end: told.append((p, end)), bar) as out:
        out.write(b"abc")
        assert out.write(bytes_of(values)) == 100
        assert out.end == 103
        assert path.stat().st_size == 103, "nothing is kept back from those who read it"
    assert told[:3] == [(path, 3), (path, 10), (path, 17)]
    assert told[-1] == (path, 103)
    back = torch.empty(5, 10, dtype=torch.bfloat16)
    read_into(back, path, 3)
    assert torch.equal(back, values)


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    with pytest.raises(FileExistsError), progress_bar("", 0) as bar:
        Output(tmp_path / "x", nothing_follows, bar)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_odd_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    (tmp_path / "x").write_bytes(bytes_of(torch.full(shape, 2.5)))
    back = torch.zeros(shape)
    read_into(back, tmp_path / "x", 0)
    assert torch.equal(back, torch.full(shape, 2.5))


def test_a_file_that_shrank_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(10))
    with pytest.raises(UserError, match=r"/x ends at byte 10, 6 bytes too early"):
        read_into(torch.empty(3), tmp_path / "x", 4)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_disk_that_is_full_names_the_file(tmp_path: Path) -> None:
    """The device refuses every write as a full disk does."""
    with progress_bar("", 0) as bar:
        output = Output(tmp_path / "x", nothing_follows, bar)
        with open("/dev/full", "wb", buffering=0) as full:
            os.dup2(full.fileno(), output._handle.fileno())
        with output, pytest.raises(OSError, match=r"No space left on device: '.*/x'"):
            output.write(b"1")


def test_a_section_is_a_file_of_its_own(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("name", b"content")
    data = inner.getvalue()
    (tmp_path / "x").write_bytes(b"before" + data + b"after")
    with open(tmp_path / "x", "rb") as handle:
        section = Section(handle, 6, len(data))
        assert section.read() == data
        assert section.read(1) == b""
        assert section.seek(-3, os.SEEK_END) == len(data) - 3
        assert section.seek(1, os.SEEK_CUR) == section.tell() == len(data) - 2
        assert section.read(10) == data[-2:]
        with pytest.raises(ValueError, match="before the section"):
            section.seek(-1)
        assert zipfile.ZipFile(section).read("name") == b"content"


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {
        "ü": torch.randn(3, 5, dtype=torch.float64),
        "b": torch.randn(7),
        "half": torch.randn(2, 2, 2).half(),
        "bf": torch.randn(9).bfloat16(),
        "scalar": torch.tensor(3.0).bfloat16(),
        "none": torch.empty(0, 4).bfloat16(),
    }
    file = tmp_path / "x.safetensors"
    header = header_bytes({n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()})
    assert len(header) % 8 == 0
    file.write_bytes(header + b"".join(bytes_of(t) for t in tensors.values()))
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_we_read_what_safetensors_writes(tmp_path: Path) -> None:
    dtypes = STORED_DTYPES.values()
    tensors = {str(d): torch.randn(2, 3, dtype=torch.float64).to(d) for d in dtypes}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].bytes == tensor.nbytes
        assert torch.equal(found[name].load(), tensor)
