"""The CUDA kernels compile for every architecture we name, without warnings or register spills.

They run in tests/gpu, on a machine with a GPU; here they are only compiled.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", sorted(path.name for path in CUDA.glob("*.cu")))
def test_kernels_compile(source: str, tmp_path: Path) -> None:
    architectures = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90, 100)]
    assert NVCC is not None
    done = subprocess.run(
        [NVCC, "-c", "-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Werror",
         "all-warnings", *architectures, str(CUDA / source), "-o", str(tmp_path / "out.o")],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert spills, "ptxas reported no kernel"
    assert set(spills) == {"0"}, done.stderr
