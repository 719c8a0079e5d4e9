"""Two tiny models and what they are imported to; no test writes into them."""

from pathlib import Path

import pytest

from megatron_deft.convert.hf import import_hf
from tests.convert.tiny_models import CONFIGS, make


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("hf") / "model", CONFIGS["llama_biases_odd_vocab"])


@pytest.fixture(scope="session")
def weights(source: Path) -> Path:
    return import_hf(source, source.parent / "weights", verify=False)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("tied") / "model", CONFIGS["llama_gqa_tied"])


@pytest.fixture(scope="session")
def tied_weights(tied: Path) -> Path:
    return import_hf(tied, tied.parent / "weights", verify=False)
