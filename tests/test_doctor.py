"""The doctor: what it finds here, and what it says when something is missing."""

import json
import re
import resource
import shutil
import sys
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import megatron_deft
from megatron_deft import doctor, ops
from megatron_deft.cli import main
from megatron_deft.doctor import PACKAGES, Finding, Package, examine, healthy, is_known, report
from megatron_deft.models import spec
from megatron_deft.ops import native

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def used() -> dict[str, Finding]:
    return {finding.name: finding for finding in examine() if finding.kind == doctor.USED}


def test_here_everything_required_is_found():
    findings = {finding.name: finding for finding in examine()}
    assert findings["torch"].found == torch.__version__
    assert findings["megatron-core"].found == metadata.version("megatron-core")
    assert findings["torch"].known == "2.6 to 2.13"
    assert findings["datasets"].known == "4 and newer"
    assert findings["device"].found
    assert healthy(list(findings.values()))
    assert "everything required is here" in report(list(findings.values()))


def test_a_missing_required_package_is_named_with_its_remedy(monkeypatch):
    present = doctor._version
    absent = {"psutil", "wandb"}
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in absent else present(name))
    findings = examine()
    text = report(findings)
    assert not healthy(findings)
    assert "missing, required: psutil: pip install psutil" in text
    assert "missing, optional: wandb: pip install wandb" in text
    assert "everything required is here" not in text


def test_without_the_extension_it_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setattr(native, "_C", None)
    finding = next(f for f in examine() if f.name == "megatron_deft._C")
    assert "pip install --no-build-isolation -e ." in finding.remedy
    assert healthy([finding])


class Raising:
    """An importer for which one module raises what no module should."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.name:
            raise SystemError("built for torch 2.9,\nthis is another")


def test_an_extension_may_raise_anything(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [Raising("megatron_deft._C"), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "megatron_deft._C")
    monkeypatch.delattr(megatron_deft, "_C")
    again = module_from_spec(spec_from_file_location("native_again", native.__file__))
    again.__spec__.loader.exec_module(again)
    assert again.devices() == ()
    said = "does not load (SystemError: built for torch 2.9, this is another); build it: pip"
    assert said in again.missing("cpu")


def test_what_the_operators_raise_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [Raising("megatron_deft.ops.native"), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "megatron_deft.ops.native")
    monkeypatch.delattr(ops, "native")
    finding = doctor._extension(gpu=False)
    assert finding.found == "cannot be tried: SystemError: built for torch 2.9, this is another"


def test_without_torch_it_still_reports(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = examine()
    device = next(f for f in findings if f.name == "device")
    assert "torch does not load" in device.found
    assert not healthy(findings)


def test_a_package_that_is_broken_is_named(monkeypatch):
    def broken():
        raise AttributeError("half\nbuilt")

    monkeypatch.setattr(doctor, "_layers", broken)
    findings = examine()
    assert not healthy(findings)
    assert any(f.found == "does not import: AttributeError: half built" for f in findings)


def test_every_row_is_aligned():
    text = report([Finding("a", "1"), Finding("long-name", "2", known="1 to 3")])
    assert text.splitlines()[:2] == ["a          1", "long-name  2  (known to work: 1 to 3)"]


def test_as_json(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Finding(**line) for line in found] == examine()


def test_what_a_run_uses_here():
    findings = used()
    kernels = f"compiled kernels, {native.instruction_set()}"
    assert findings["loss on cpu"].found == kernels
    assert findings["attention"].found == "megatron_deft (TorchAttention)"
    assert findings["optimizer"].found == "Adam of torch"
    assert findings["FP8"].found == "not possible: it needs a GPU, and there is none"
    assert findings["gradient accumulation fusion"].found.startswith("no: it needs a GPU")
    assert findings["CPU offload of the optimizer"].found.startswith("no: it needs a GPU")
    assert findings["distributed"].found == "gloo"


def test_it_asks_what_a_run_asks(monkeypatch):
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setenv("MEGATRON_DEFT_OPS", "reference")
    parts = spec.Parts(*[torch.nn.Linear] * 3, attention=torch.nn.Bilinear)
    monkeypatch.setattr(spec, "parts", lambda: parts)
    findings = used()
    assert findings["loss on cpu"].found == "plain torch operators"
    assert findings["attention"].found == "torch (Bilinear)"


def test_kernels_that_are_asked_for_and_missing_are_wrong(monkeypatch):
    monkeypatch.setattr(ops, "_chosen", {})
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setenv("MEGATRON_DEFT_OPS", "native")
    findings = examine()
    assert not healthy(findings)
    assert "wrong: loss on cpu: MEGATRON_DEFT_OPS=native, but the extension" in report(findings)


def test_the_error_of_transformer_engine_is_shown(monkeypatch, tmp_path):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    broken = "raise RuntimeError('built for\\nanother torch')"
    (tmp_path / "transformer_engine" / "pytorch.py").write_text(broken)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    ask = spec.obstacle_to_transformer_engine.__wrapped__
    assert ask() == "there is no GPU"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        obstacle = ask()
        assert obstacle == "it does not import: built for\nanother torch"
        shutil.rmtree(tmp_path / "transformer_engine")
        patch.delitem(sys.modules, "transformer_engine")
        assert ask() == "it is not installed"
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setattr(spec, "obstacle_to_transformer_engine", lambda: obstacle)
    monkeypatch.setattr(doctor, "_version", lambda name: "2.9.0")
    findings = [f for f in examine() if f.name == "transformer-engine"]
    assert [f.found for f in findings] == [
        "2.9.0",
        "not used: it does not import: built for another torch",
    ]
    assert findings[1].remedy


@pytest.mark.parametrize(
    ("version", "known"),
    [("4.57", True), ("4.56.9", False), ("5.23.4", True), ("5.24.0.dev1", False), ("5.0rc1", True)],
)
def test_versions_that_are_known_to_work(monkeypatch, version, known):
    package = Package("transformers", "", "", oldest="4.57", newest="5.23")
    assert is_known(package, version) == known
    present = doctor._version
    changed = {"transformers": version}
    monkeypatch.setattr(doctor, "_version", lambda name: changed.get(name) or present(name))
    text = report(examine())
    assert ("warning: transformers: not tried; known to work: 4.57 to 5.23" in text) != known
    assert "everything required is here" in text


def test_the_versions_are_those_of_the_package():
    asked = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?[>=]=([\d.]+)"', PYPROJECT.read_text()))
    for package in PACKAGES:
        assert package.oldest == asked.get(package.name), package.name


def test_no_extra_brings_a_datasets_that_runs_scripts():
    """lm-eval would do with 2.16, and its tasks ask to trust the code of their data sets."""
    lists = dict(re.findall(r"^(\w+) = (\[.*\])", PYPROJECT.read_text(), re.MULTILINE))
    extras = {name: json.loads(packages) for name, packages in lists.items()}
    needing = [
        name
        for name, packages in extras.items()
        if any(package.startswith(("datasets", "lm-eval")) for package in packages)
    ]
    assert needing == ["hub", "general"]
    for name in needing:
        assert "datasets>=4" in extras[name]


def test_limits_of_the_machine(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 2048))
    monkeypatch.setattr(Path, "exists", lambda path: True)
    findings = {finding.name: finding for finding in doctor._machine(gpu=False)}
    assert "--shm-size" in findings["/dev/shm"].remedy
    assert findings["open files"].remedy == "ulimit -n 65536"
    assert findings["GPU"].found.startswith("not used: torch")
