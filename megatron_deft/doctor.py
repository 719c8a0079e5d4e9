"""What is installed, on which device it would run, and what is missing with its remedy."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the report; `remedy` is empty when all is well."""

    name: str
    found: str
    remedy: str = ""
    required: bool = False


class Package(NamedTuple):
    """A distribution, what it is for, and the remedy when it is absent."""

    name: str
    purpose: str
    remedy: str
    required: bool = False


_REINSTALL = "pip install --no-build-isolation -e ."
PACKAGES = (
    Package("torch", "everything", "pip install torch", required=True),
    Package("megatron-core", "training", _REINSTALL, required=True),
    Package("transformers", "tokenizers, conversion", _REINSTALL, required=True),
    Package("safetensors", "conversion", _REINSTALL, required=True),
    Package("pyarrow", "data files", _REINSTALL, required=True),
    Package("psutil", "saving checkpoints", "pip install psutil", required=True),
    Package("tensorboard", "monitor.tensorboard", "pip install tensorboard"),
    Package("wandb", "monitor.wandb", "pip install wandb"),
    Package("reasoning-gym", "prepare figfont", "pip install 'megatron-deft[figfont]'"),
    Package("datasets", "prepare from the Hub", "pip install 'megatron-deft[hub]'"),
    Package("math-verify", "evaluate math", "pip install 'megatron-deft[math]'"),
    Package("lm-eval", "evaluate general", "pip install 'megatron-deft[general]'"),
    Package("matplotlib", "report", "pip install 'megatron-deft[report]'"),
    Package("vllm", "evaluate --engine vllm", "an environment of its own: pip install vllm"),
)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    for package in PACKAGES:
        version = _version(package.name)
        if version:
            yield Finding(package.name, version)
        else:
            found = f"not installed (for {package.purpose})"
            yield Finding(package.name, found, package.remedy, package.required)


def _accelerators(gpu: bool) -> Iterator[Finding]:
    """transformer-engine and NVIDIA apex: kernels for a GPU; nothing here needs them."""
    version = _version("transformer-engine")
    remedy = "pip install --no-build-isolation 'transformer-engine[pytorch]'" if gpu else ""
    found = version or "not installed (GPU only)"
    yield Finding("transformer-engine", found, "" if version else remedy)
    yield Finding("apex", _version("apex") or "not installed (GPU only; torch's Adam is used)")


def _device() -> tuple[Finding, bool]:
    try:
        import torch

        from megatron_deft.platform import backend
    except (ImportError, OSError) as error:
        return Finding("device", f"torch does not load: {error}", "pip install torch", True), False
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
    except (ImportError, OSError) as error:
        return Finding("megatron_deft._C", f"cannot be tried: {error}", "pip install torch")
    wanted = "cuda" if gpu else "cpu"
    if wanted in native.devices():
        devices = f"{' and '.join(native.devices())}, on the CPU {native.instruction_set()}"
        return Finding("megatron_deft._C", f"loads, kernels for {devices}")
    return Finding("megatron_deft._C", "plain torch operators are used", native.missing(wanted))


def examine() -> list[Finding]:
    """Every finding, in the order they are printed."""
    from megatron_deft import __version__

    device, gpu = _device()
    own = Finding("megatron-deft", __version__)
    return [own, *_packages(), *_accelerators(gpu), device, _extension(gpu)]


def report(findings: list[Finding]) -> str:
    """The findings as text: one line each, then what is missing and how to get it."""
    width = max(len(finding.name) for finding in findings)
    lines = [f"{finding.name:<{width}}  {finding.found}" for finding in findings]
    for words, required in (("required", True), ("optional", False)):
        wanting = [f for f in findings if f.remedy and f.required is required]
        lines += [f"missing, {words}: {f.name}: {f.remedy}" for f in wanting]
    if not any(finding.remedy and finding.required for finding in findings):
        lines.append("everything required is here")
    return "\n".join(lines)


def healthy(findings: list[Finding]) -> bool:
    """Whether nothing required is missing."""
    return not any(finding.remedy and finding.required for finding in findings)
