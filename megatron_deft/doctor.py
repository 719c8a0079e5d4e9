"""What is installed, what of it a run would use, and what is wrong or missing with its remedy.

What would be used is asked of the functions that decide it in a run.
"""

from __future__ import annotations

import re
import resource
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

INSTALLED, USED, MACHINE = "installed", "used", "machine"  # in the order they are printed
SHARED_MEMORY = 1 << 30  # bytes; containers have 64 MiB unless told otherwise
OPEN_FILES = 4096  # a rank has a socket to each other, and files of data sets


class Finding(NamedTuple):
    """One line of the report; `remedy` is empty when all is well.

    known: the versions that are known to work
    """

    name: str
    found: str
    remedy: str = ""
    required: bool = False
    kind: str = INSTALLED
    known: str = ""


class Package(NamedTuple):
    """A distribution, what it is for, the remedy when it is absent, and what is known to work.

    oldest, newest: the version that pyproject.toml asks for, and the newest that the tests have run
                    with; None: any
    """

    name: str
    purpose: str
    remedy: str
    required: bool = False
    oldest: str | None = None
    newest: str | None = None


_REINSTALL = "pip install --no-build-isolation -e ."
PACKAGES = (
    Package("torch", "everything", "pip install torch", True, "2.6", "2.13"),
    Package("megatron-core", "training", _REINSTALL, True, "0.16.1", "0.16.1"),
    Package("transformers", "tokenizers, conversion", _REINSTALL, True, "4.57", "5.23"),
    Package("safetensors", "conversion", _REINSTALL, True),
    Package("pyarrow", "data files", _REINSTALL, True),
    Package("psutil", "saving checkpoints", "pip install psutil", True),
    Package("tensorboard", "monitor.tensorboard", "pip install tensorboard"),
    Package("wandb", "monitor.wandb", "pip install wandb"),
    Package(
        "reasoning-gym", "prepare figfont", "pip install 'megatron-deft[figfont]'", False,
        "0.1.25", "0.1.25",
    ),
    Package("datasets", "prepare from the Hub", "pip install 'megatron-deft[hub]'", oldest="4"),
    Package(
        "math-verify", "evaluate math", "pip install 'megatron-deft[math]'", False, "0.9.0", "0.9.0"
    ),
    Package(
        "lm-eval", "evaluate general", "pip install 'megatron-deft[general]'", False,
        "0.4.13", "0.4.13",
    ),
    Package("matplotlib", "report", "pip install 'megatron-deft[report]'"),
    Package("vllm", "evaluate --engine vllm", "an environment of its own: pip install vllm"),
)  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def is_known(package: Package, version: str) -> bool:
    """Whether `version` lies within what is known to work: 5.23.1 is 5.23."""
    release = _release(version)
    oldest, newest = _release(package.oldest or ""), _release(package.newest or "")
    return release >= oldest and (not newest or release[: len(newest)] <= newest)


def _packages() -> Iterator[Finding]:
    for package in PACKAGES:
        version = _version(package.name)
        if version is None:
            found = f"not installed (for {package.purpose})"
            yield Finding(package.name, found, package.remedy, package.required)
            continue
        ends = dict.fromkeys(v for v in (package.oldest, package.newest) if v)
        span = " to ".join(ends) if package.newest else " ".join((*ends, "and newer"))
        remedy = "" if is_known(package, version) else f"not tried; known to work: {span}"
        yield Finding(package.name, version, remedy, known=span if ends else "")


def _accelerators(gpu: bool) -> Iterator[Finding]:
    """transformer-engine and NVIDIA apex: kernels for a GPU; nothing here needs them."""
    version = _version("transformer-engine")
    remedy = "pip install --no-build-isolation 'transformer-engine[pytorch]'" if gpu else ""
    found = version or "not installed (GPU only)"
    yield Finding("transformer-engine", found, "" if version else remedy)
    yield Finding("apex", _version("apex") or "not installed (GPU only)")


def _device() -> tuple[Finding, bool]:
    try:
        import torch

        from megatron_deft.platform import backend
    except Exception as error:  # as in _used
        return Finding(
            "device", f"torch does not load: {_why(error)}", "pip install torch", True
        ), False
    gpu = backend() == "nccl"
    if not gpu:
        return Finding("device", f"CPU, {torch.get_num_threads()} threads, gloo"), False
    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    return Finding(
        "device", f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, nccl"
    ), True


def _extension(gpu: bool) -> Finding:
    """The compiled operators; without them the same operators run in plain torch, slower."""
    try:
        from megatron_deft.ops import native
    except Exception as error:  # as in _used
        return Finding("megatron_deft._C", f"cannot be tried: {_why(error)}", "pip install torch")
    wanted = "cuda" if gpu else "cpu"
    if wanted in native.devices():
        devices = f"{' and '.join(native.devices())}, on the CPU {native.instruction_set()}"
        return Finding("megatron_deft._C", f"loads, kernels for {devices}")
    return Finding("megatron_deft._C", "plain torch operators are used", native.missing(wanted))


def _loss_kernels(gpu: bool) -> Iterator[Finding]:
    """Which operators the loss runs, by device, as `ops` chooses them."""
    import torch

    from megatron_deft import ops
    from megatron_deft.errors import UserError

    for kind in ("cpu", "cuda") if gpu else ("cpu",):
        name = f"loss on {kind}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it says what is told here anyhow
                is_native = ops.implementation(torch.device(kind)) is ops.native
        except UserError as error:
            yield Finding(name, "nothing", str(error), True, USED)
            continue
        kernels = "compiled kernels" if is_native else "plain torch operators"
        extra = f", {ops.native.instruction_set()}" if is_native and kind == "cpu" else ""
        yield Finding(name, kernels + extra, kind=USED)


def _layers() -> Iterator[Finding]:
    """The parts of a layer, as models/spec.py chooses them, megatron-core's Adam, and what a GPU
    and NVIDIA's packages would add."""
    from megatron_deft.platform import backend, import_megatron

    import_megatron()

    from megatron_deft.models.accelerators import (
        FP8_RECIPES,
        adam_source,
        obstacle_to_cpu_offload,
        obstacle_to_fp8,
        obstacle_to_gradient_accumulation_fusion,
    )
    from megatron_deft.models.spec import obstacle_to_transformer_engine, parts

    for name, part in asdict(parts()).items():
        yield Finding(name.replace("_", " "), f"{_package(part)} ({part.__name__})", kind=USED)
    yield Finding("optimizer", f"Adam of {adam_source()}", kind=USED)
    yield Finding("distributed", backend(), kind=USED)
    obstacles = {recipe: obstacle_to_fp8(recipe) for recipe in FP8_RECIPES}
    able = ", ".join(recipe for recipe, obstacle in obstacles.items() if not obstacle)
    no_fp8 = "; ".join(dict.fromkeys(obstacles.values()))
    yield Finding("FP8", able or f"not possible: {no_fp8}", kind=USED)
    for name, obstacle in (
        ("gradient accumulation fusion", obstacle_to_gradient_accumulation_fusion()),
        ("CPU offload of the optimizer", obstacle_to_cpu_offload()),
    ):
        yield Finding(name, f"no: {obstacle}" if obstacle else "yes", kind=USED)
    obstacle = obstacle_to_transformer_engine()
    if obstacle and _version("transformer-engine"):
        remedy = "" if obstacle == "there is no GPU" else "build it for this torch and driver"
        found = f"not used: {obstacle}"
        yield Finding("transformer-engine", " ".join(found.split()), remedy, kind=USED)


def _package(part: type) -> str:
    """Whose a class is; megatron-core's wrappers of TransformerEngine count as the latter's."""
    module = part.__module__
    return "transformer_engine" if "transformer_engine" in module else module.split(".")[0]


def _machine(gpu: bool) -> Iterator[Finding]:
    """Limits that runs hit, and a GPU that torch does not see."""
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        remedy = "a container: --shm-size=16g, or --ipc=host" if size < SHARED_MEMORY else ""
        yield Finding("/dev/shm", f"{size / 1e9:.1f} GB", remedy, kind=MACHINE)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = soft == resource.RLIM_INFINITY or soft >= OPEN_FILES
    found = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    yield Finding("open files", found, "" if many else "ulimit -n 65536", kind=MACHINE)
    if gpu and Path("/sys/class/infiniband").is_dir():
        locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        free = locked == resource.RLIM_INFINITY
        found = "unlimited" if free else f"{locked} bytes"
        remedy = "" if free else "ulimit -l unlimited: InfiniBand needs it"
        yield Finding("locked memory", found, remedy, kind=MACHINE)
    if not gpu and Path("/dev/nvidiactl").exists():
        import torch

        why = "has no CUDA" if torch.version.cuda is None else "finds no driver that is new enough"
        remedy = "install the torch of https://pytorch.org for this driver"
        yield Finding("GPU", f"not used: torch {torch.__version__} {why}", remedy, kind=MACHINE)


def _why(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _used(gpu: bool) -> Iterator[Finding]:
    """What a run would use; where something does not import, that."""
    for ask in (lambda: _loss_kernels(gpu), _layers):
        try:
            yield from ask()
        except Exception as error:  # a package that is broken may raise anything at its import
            yield Finding("training", f"does not import: {_why(error)}", _REINSTALL, True, USED)


def examine() -> list[Finding]:
    """Every finding, in the order they are printed."""
    from megatron_deft import __version__

    device, gpu = _device()
    own = Finding("megatron-deft", __version__)
    python = Finding("python", ".".join(map(str, sys.version_info[:3])))
    loads = not device.required
    return [
        own, python, *_packages(), *_accelerators(gpu), device, _extension(gpu),
        *(_used(gpu) if loads else ()), *(_machine(gpu) if loads else ()),
    ]  # fmt: skip


def report(findings: list[Finding]) -> str:
    """The findings as text: one line each, then what is wrong or missing and its remedy."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for kind, title in ((INSTALLED, ""), (USED, "a run here uses"), (MACHINE, "this machine")):
        of_kind = [
            f"{f.name:<{width}}  {f.found}" + (f"  (known to work: {f.known})" if f.known else "")
            for f in findings
            if f.kind == kind
        ]
        lines += [title] * bool(of_kind and title) + of_kind
    for finding in sorted(findings, key=lambda finding: not finding.required):
        if finding.remedy:
            lines.append(f"{_fault(finding)}: {finding.name}: {finding.remedy}")
    if healthy(findings):
        lines.append("everything required is here")
    return "\n".join(lines)


def _fault(finding: Finding) -> str:
    if finding.kind == INSTALLED and "not installed" in finding.found:
        return f"missing, {'required' if finding.required else 'optional'}"
    return "wrong" if finding.required else "warning"


def healthy(findings: list[Finding]) -> bool:
    """Whether nothing required is missing."""
    return not any(finding.remedy and finding.required for finding in findings)
