"""Tiny models with weights large enough that their answers differ from prompt to prompt."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file

from megatron_deft.data.tiny import make_tiny_llama

TEXTS = ["What word does this say?\n\n|_|  |_|\n| |  | |\n", "CAT DOG WORD"] * 4
WORDS = ["CAT", "DOG", "WORD", "AB", "HELLO", "TEN", "AT", "ZOO", "QUIZ", "ON", "SIX"]

# What a test may take depends on the machine, not on the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def make_model(folder: Path, seed: int, **options: Any) -> Path:
    """A tiny Llama in `folder` whose logits are spread out."""
    make_tiny_llama(folder, TEXTS, vocab_size=300, hidden_size=32, seed=seed, **options)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            weights[name] = torch.randn(tensor.shape, generator=generator) / tensor.shape[1] ** 0.5
    weights["model.embed_tokens.weight"] *= 8
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "first", 1)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "second", 2)


def question(word: str) -> str:
    """Art of a kind: as many columns as letters."""
    return "What word does this say?\n\n" + "|_|  " * len(word) + "\n" + "| |  " * len(word) + "\n"


@pytest.fixture(scope="session")
def messages_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `prepare figfont` writes it."""
    file = tmp_path_factory.mktemp("data") / "test.parquet"
    turns = [
        [
            {"role": "system", "content": "Read."},
            {"role": "user", "content": question(word)},
            {"role": "assistant", "content": word},
        ]
        for word in WORDS
    ]
    pq.write_table(pa.table({"messages": turns, "data_source": ["figlet_font"] * len(WORDS)}), file)
    return file


@pytest.fixture(scope="session")
def released_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released columns."""
    file = tmp_path_factory.mktemp("data") / "released.parquet"
    info = [{"question": question(word), "answer": word, "split": "test"} for word in WORDS]
    pq.write_table(pa.table({"extra_info": info}), file)
    return file
