"""Folders go from transformers 5 to 4.57 and back, through Megatron, and mean the same to both.

Runs in the environment of 4.57 (`make test-transformers4`), with the other one's python as a
subprocess.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.convert.tiny_models import CONFIGS, assert_same_tensors, tensors
from tests.transformers4 import exchange

if "OTHER_PYTHON" not in os.environ:
    pytest.skip("needs two environments: make test-transformers4", allow_module_level=True)

ROOT = Path(__file__).parents[2]


def run_other(what: str, folder: Path) -> None:
    done = subprocess.run(
        [os.environ["OTHER_PYTHON"], "-m", "tests.transformers4.exchange", what, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made, imported and exported under the other transformers."""
    folder = tmp_path_factory.mktemp("theirs")
    run_other("write", folder)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made under this transformers, imported and exported under the other."""
    folder = tmp_path_factory.mktemp("ours")
    for case in CONFIGS:
        exchange.record(exchange.write_source(folder / case, case))
    run_other("read", folder)
    return folder


def assert_same(
    said: dict[str, Any], values: dict[str, Tensor], other: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    differing = {key: (said[key], other[0][key]) for key in said if said[key] != other[0][key]}
    assert not differing
    for name, value in values.items():
        reference = other[1][name]
        assert (value - reference).abs().max() <= 1e-5 * reference.abs().max(), name


def test_the_two_are_of_different_versions() -> None:
    code = "import transformers; print(transformers.__version__)"
    found = [
        subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
        for python in (os.environ["OTHER_PYTHON"], sys.executable)
    ]
    assert [version.partition(".")[0] for version in found] == ["5", "4"]


@pytest.mark.parametrize("case", CONFIGS)
def test_an_export_of_theirs_is_read_alike(theirs: Path, case: str) -> None:
    folder = theirs / case / "exported"
    source, exported = exchange.recorded(theirs / case / "source"), exchange.recorded(folder)
    assert_same(exchange.facts(folder), exchange.computed(folder), exported)
    assert_same(*exported, source)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_of_theirs_is_imported_here(theirs: Path, case: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.symlink_to(theirs / case / "source")
    again = exchange.through_megatron(source)
    assert_same_tensors(tensors(again), tensors(source))
    assert_same(exchange.facts(again), {}, exchange.recorded(theirs / case / "source"))


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_of_ours_is_imported_there(ours: Path, case: str) -> None:
    source, exported = ours / case / "source", ours / case / "exported"
    assert_same_tensors(tensors(exported), tensors(source))
    assert_same(*exchange.recorded(source), exchange.recorded(exported))
    assert_same(exchange.facts(exported), {}, exchange.recorded(source))
