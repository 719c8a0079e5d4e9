"""What `megatron-deft convert` calls, prints and returns."""

import pytest

from megatron_deft.cli import main
from megatron_deft.convert import hf, verify


@pytest.mark.parametrize(
    ("argv", "name", "expected", "named"),
    [
        (["import", "hf", "out"], "import_hf", ("hf", "out", None, False, True), {"base": None}),
        (["import", "hf", "out", "--dtype", "bf16", "--overwrite", "--no-verify"], "import_hf",
         ("hf", "out", "bf16", True, False), {"base": None}),
        (["import", "hf", "out", "--base", "owner/model"], "import_hf",
         ("hf", "out", None, False, True), {"base": "owner/model"}),
        (["export", "run", "out", "--dtype", "fp32"], "export_hf",
         ("run", "out", "fp32", False, True), {"base": None}),
        (["export", "run", "out", "--base", "moved"], "export_hf",
         ("run", "out", None, False, True), {"base": "moved"}),
    ],
)  # fmt: skip
def test_convert_calls(monkeypatch, capsys, argv, name, expected, named):
    seen = []
    monkeypatch.setattr(hf, name, lambda *a, **n: seen.append((a, n)))
    assert main(["convert", *argv]) == 0
    assert seen == [(expected, named)]
    verified = "not verified" not in capsys.readouterr().out
    assert verified is expected[-1]


@pytest.mark.parametrize(("difference", "code"), [(1e-7, 0), (0.5, 1), (float("nan"), 1)])
def test_convert_verify_prints_and_judges(monkeypatch, capsys, difference, code):
    seen = []
    found = {"embedding": 0.0, "layer 0": difference, "logits": difference}
    report = verify.Report(found, 64, difference, "mlp", verify.Tensors(7), 4095)
    monkeypatch.setattr(verify, "verify", lambda *args: seen.append(args) or report)
    argv = ["a", "b", "--prompt", "one", "--prompt", "two", "--dtype", "bf16"]
    assert main(["convert", "verify", *argv]) == code
    assert seen == [("a", "b", ["one", "two"], "bf16")]
    out = capsys.readouterr().out
    assert "7 tensors compared" in out
    assert "64 tokens, positions up to 4095" in out
    assert ("DIFFERENT: logits" in out and "first at layer 0 (mlp)" in out) == bool(code)
    assert out.endswith("equal\n") != bool(code)


def test_convert_verify_of_tensors(monkeypatch, capsys):
    tensors = verify.Tensors(7, ("x.weight",), ("y.weight (not in a)",))
    report = verify.Report({"logits": 0.0}, 64, 0.0, None, tensors)
    monkeypatch.setattr(verify, "verify", lambda *args: report)
    assert main(["convert", "verify", "a", "b"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERENT: 1 of 7 tensors differ: x.weight" in out
    assert "DIFFERENT: only one has y.weight (not in a)" in out
