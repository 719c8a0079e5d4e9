"""Everything here needs the real NeMo."""

from importlib.util import find_spec
from pathlib import Path

import pytest

REASON = "needs NeMo 2 in an environment of its own: make test-nemo"


def has_nemo() -> bool:
    return find_spec("nemo") is not None and find_spec("nemo.collections") is not None


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a tokenizer of 301 tokens."""
    from megatron_deft.data.tiny import make_tiny_llama

    folder = tmp_path_factory.mktemp("tokenizer") / "tiny"
    texts = [f"what is {i} plus {i}? it is {2 * i}" for i in range(64)]
    make_tiny_llama(
        folder, texts, vocab_size=301, hidden_size=32, layers=1, heads=4, kv_heads=2, seed=3
    )
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files for NeMo's FineTuningDataModule."""
    from tests.nemo.training import write_data

    return write_data(tmp_path_factory.mktemp("nemo") / "data")
