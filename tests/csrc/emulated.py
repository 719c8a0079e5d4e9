"""The CUDA sources compiled by the C++ compiler against tests/csrc/emulator, and cases to run."""

import os
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests" / "csrc" / "emulator"
CXX = os.environ.get("CXX", "c++")
IGNORE = -100
POISON = 0x7B  # no zero, no nan and no plausible result in any type
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = ["row_stats", "gate_grad", "row_stats_grad", "scale_rows"]
ORDERS = ["forward", "backward", "first", "last"]
DEFT = (1.0, 0.0, 1e-6, -torch.inf, torch.inf, 0.0, 1.0, 0.0)
EAFT = (0.0, 0.0, 0.0, -torch.inf, torch.inf, 1.0, 3.0, 20.0)


def build(folder: Path) -> Path:
    """Compile every kernel for the CPU, with the address and undefined-behaviour sanitizers."""
    flags = ["-std=c++20", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-strict-aliasing"]
    flags += ["-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), *sorted(EMULATOR.glob("*.cpp"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    compilers = [
        subprocess.Popen([CXX, *flags, f"-I{EMULATOR}", "-x", "c++", "-c", source, "-o", target])
        for source, target in zip(sources, objects, strict=True)
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(compilers)
    program = folder / "run_kernels"
    subprocess.run([CXX, "-fsanitize=address,undefined", *objects, "-o", program], check=True)
    return program


@dataclass
class Rows:
    """Rows inside a larger storage whose other bytes nobody may write.

    The storage starts at a multiple of 16 bytes and ends with the last row.
    """

    storage: Tensor
    shape: tuple[int, int]
    stride: int
    offset: int

    @property
    def view(self) -> Tensor:
        return self.storage.as_strided(self.shape, (self.stride, 1), self.offset)

    def like(self, data: bytes) -> "Rows":
        storage = torch.frombuffer(bytearray(data), dtype=self.storage.dtype)
        return Rows(storage, self.shape, self.stride, self.offset)

    def untouched_outside(self, other: "Rows") -> bool:
        mask = torch.ones(self.storage.shape, dtype=torch.bool)
        mask.as_strided(self.shape, (self.stride, 1), self.offset).fill_(False)
        return torch.equal(bits(self.storage)[mask], bits(other.storage)[mask])


def bits(t: Tensor) -> Tensor:
    """The representation, so that nan equals itself."""
    return t.contiguous().view(torch.int32 if t.element_size() == 4 else torch.int16)


def rows(values: Tensor, gap: int = 0, offset: int = 0) -> Rows:
    """`values` with `gap` foreign elements between rows and `offset` before the first."""
    n, columns = values.shape
    stride = columns + gap
    storage = poisoned(offset + (n - 1) * stride + columns, values.dtype)
    out = Rows(storage, (n, columns), stride, offset)
    out.view.copy_(values)
    return out


def poisoned(count: int, dtype: torch.dtype) -> Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.full((count * size,), POISON, dtype=torch.uint8).view(dtype)


@dataclass
class Case:
    """One launch. `out` None: in place. threads 0: the launcher chooses the plan."""

    op: str
    logits: Rows
    labels: Tensor
    out: Rows | None = None
    per_row: Sequence[Tensor] = ()
    start: int = 0
    valid: int = -1
    gate: Sequence[float] = DEFT
    topk: int = 0
    threads: int = 0
    parts: int = 1
    on_chip: bool = True
    bulk: bool = True
    order: str = "forward"
    run: int = 0  # rows of a run of the logits, runs being run_stride apart; 0: all of them
    run_stride: int = 0

    def encoded(self) -> bytes:
        n, columns = self.logits.shape
        dtype = DTYPES.index(self.logits.storage.dtype)
        valid = columns if self.valid < 0 else self.valid
        out = self.out
        numbers = [OPS.index(self.op), dtype, n, columns, self.logits.stride, self.start, valid]
        numbers += [IGNORE, self.topk, self.logits.offset]
        numbers += [out.offset, out.stride] if out else [0, 0]
        numbers += [self.threads, self.parts, self.on_chip, self.bulk, ORDERS.index(self.order)]
        numbers += [self.run or n, self.run_stride]
        stats = poisoned((5 + self.topk) * n, torch.float32)
        empty = torch.empty(0)
        buffers = [self.labels, self.logits.storage, out.storage if out else empty, stats]
        buffers += [*self.per_row, empty, empty, empty][:3]
        encoded = struct.pack("<24q8d", *numbers, *[0] * (24 - len(numbers)), *self.gate)
        for buffer in buffers:
            data = bytes(buffer.contiguous().view(torch.uint8).numpy())
            encoded += struct.pack("<q", len(data)) + data
        return encoded


@dataclass
class Result:
    """What the buffers hold after a launch."""

    logits: Rows
    out: Rows  # the logits' if in place
    stats: Tensor  # [5 + topk, N]


def run(
    program: Path, folder: Path, cases: Sequence[Case], shared: int = 227 * 1024, clusters: int = 1
) -> list[Result]:
    """Run all cases in one process; an error of the sanitizers or the emulator is this one's.

    shared, clusters: bytes of shared memory a block can have, and whether there are clusters
    """
    source, target = folder / "cases", folder / "results"
    with source.open("wb") as file:
        for case in cases:
            file.write(case.encoded())
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    done = subprocess.run(
        [program, source, target, str(shared), str(clusters)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = []
    with target.open("rb") as file:
        for case in cases:
            logits = case.logits.like(file.read(case.logits.storage.nbytes))
            out = case.out.like(file.read(case.out.storage.nbytes)) if case.out else logits
            n = case.labels.numel()
            stats = torch.frombuffer(
                bytearray(file.read((5 + case.topk) * n * 4)), dtype=torch.float32
            )
            results.append(Result(logits, out, stats.view(-1, n)))
        assert not file.read(1)
    return results
