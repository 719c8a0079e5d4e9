"""The doctor: what it finds here, and what it says when something is missing."""

import json
import sys
from importlib import metadata

import torch

from megatron_deft import doctor
from megatron_deft.cli import main
from megatron_deft.doctor import Finding, examine, healthy, report


def test_here_everything_required_is_found():
    findings = {finding.name: finding for finding in examine()}
    assert findings["torch"].found == torch.__version__
    assert findings["megatron-core"].found == metadata.version("megatron-core")
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
    from megatron_deft.ops import native

    monkeypatch.setattr(native, "_C", None)
    finding = next(f for f in examine() if f.name == "megatron_deft._C")
    assert "pip install --no-build-isolation -e ." in finding.remedy
    assert healthy([finding])


def test_without_torch_it_still_reports(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = examine()
    device = next(f for f in findings if f.name == "device")
    assert "torch does not load" in device.found
    assert not healthy(findings)


def test_every_row_is_aligned():
    text = report([Finding("a", "1"), Finding("long-name", "2")])
    assert text.splitlines()[:2] == ["a          1", "long-name  2"]


def test_as_json(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Finding(**line) for line in found] == examine()
