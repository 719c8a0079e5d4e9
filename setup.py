"""Build of the package and its C++/CUDA extension `megatron_deft._C`.

    pip install --no-build-isolation -e .

builds against the torch that is installed: the CPU operators always, the CUDA ones when that torch
has CUDA and nvcc is found. The variable TORCH_CUDA_ARCH_LIST chooses the architectures.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit(
        "megatron_deft builds against the torch you use, and none is installed here: "
        "pip install torch ninja 'setuptools>=77' wheel pybind11, "
        "then pip install --no-build-isolation -e ."
    )

if not shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]):
    sys.exit("megatron_deft needs a C++20 compiler: install g++ (or clang++ and set CXX)")

# A bare nvcc on the PATH can make CUDA_HOME a folder without CUDA's headers.
HAS_TOOLKIT = CUDA_HOME is not None and Path(CUDA_HOME, "include/cuda_runtime_api.h").exists()
WITH_CUDA = torch.version.cuda is not None and HAS_TOOLKIT
if torch.version.cuda is not None and not HAS_TOOLKIT:
    print(
        f"megatron_deft: torch has CUDA {torch.version.cuda}, but no toolkit is at CUDA_HOME="
        f"{CUDA_HOME}: only the CPU operators are built; set CUDA_HOME to build the CUDA ones",
        file=sys.stderr,
    )


def extension() -> CppExtension:
    """The one extension module, with or without its CUDA sources."""
    sources = ["csrc/bindings.cpp", *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))]
    # torch's own threads run the loops; Apple's compiler has no OpenMP, where one thread does
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    cxx = ["-O3", "-std=c++20", *openmp]
    if not WITH_CUDA:
        return CppExtension(
            "megatron_deft._C",
            sources,
            extra_compile_args={"cxx": cxx},
            extra_link_args=openmp,
        )
    sources += ["csrc/cuda/ops.cpp", *map(str, sorted(Path("csrc/cuda").glob("*.cu")))]
    return CUDAExtension(
        "megatron_deft._C",
        sources,
        define_macros=[("MDEFT_WITH_CUDA", None)],
        extra_link_args=openmp,
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]},
    )


setup(
    packages=find_packages(include=["megatron_deft*"]),
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
)
