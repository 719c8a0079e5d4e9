"""The CUDA kernels compile for every architecture we name, without warnings or register spills.

They run in tests/gpu, on a machine with a GPU; here they are only compiled.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", sorted(path.name for path in CUDA.glob("*.cu")))
def test_kernels_compile(source: str, tmp_path: Path) -> None:
    architectures = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90, 100)]
    assert NVCC is not None
    done = subprocess.run(
        [NVCC, "-c", "-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Werror",
         "all-warnings", "--threads=3", *architectures, str(CUDA / source),
         "-o", str(tmp_path / "out.o")],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert spills, "ptxas reported no kernel"
    assert set(spills) == {"0"}, done.stderr
    assert set(re.findall(r"(\d+) bytes stack frame", done.stderr)) == {"0"}, done.stderr


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_the_host_side_compiles(tmp_path: Path) -> None:
    """Against the CUDA headers that torch ships in its CPU builds too, all but a generated one."""
    generated = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.write_text("#pragma once\n")
    assert NVCC is not None
    dry = subprocess.run([NVCC, "-dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = re.search(r"TOP=(\S+)", dry.stderr)  # nvcc may be a wrapper: it knows where it lives
    assert top is not None, dry.stderr
    cuda = Path(top[1]) / "include"
    includes = [str(generated.parents[3]), *include_paths(), str(cuda)]
    done = subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror",
         *(word for path in includes for word in ("-isystem", path)), str(CUDA / "ops.cpp")],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
