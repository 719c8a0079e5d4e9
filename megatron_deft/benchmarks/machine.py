"""Where a measurement was made: the machine and the versions."""

from __future__ import annotations

import os
import platform as host
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from megatron_deft import __version__
from megatron_deft.benchmarks.peers import version
from megatron_deft.ops import implementation, native

PACKAGES = ("torch", "megatron-core", "liger-kernel", "transformer-engine", "triton")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_model() -> str:
    """The processor's own name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)", info.read_text(), re.M) if info.exists() else None
    return named[1].strip() if named else host.processor() or host.machine()


def _huge_pages() -> str | None:
    """Which fresh memory gets large pages: much of what big allocations on a CPU cost."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return chosen[1] if chosen else None


def machine(device: str) -> dict[str, Any]:
    """Processor, cores and threads; with CUDA also the GPU and its driver."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": native.instruction_set() if native.devices() else None,
        "system": f"{host.system()} {host.release()}",
        "huge_pages": _huge_pages(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": driver.splitlines()[0] if driver else None,
            "cuda": torch.version.cuda,
        }
    return facts


def versions() -> dict[str, str | None]:
    """Of Python, this package and what it is compared with; None where not installed."""
    return {
        "python": host.python_version(),
        "megatron-deft": __version__,
        **{package: version(package) for package in PACKAGES},
    }


def operators(device: str) -> str:
    """Whose kernels token_loss runs on the device: "native" or "reference"."""
    return implementation(torch.device(device)).__name__.rpartition(".")[2]
