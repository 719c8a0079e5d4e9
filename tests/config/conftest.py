"""A configuration file with nothing but the required keys."""

from pathlib import Path

import pytest

MINIMAL = "run_dir: runs/a\nmodel: {load: weights}\ndata: {train_files: [train.parquet]}\n"


@pytest.fixture
def write(tmp_path):
    def to_file(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return to_file


@pytest.fixture
def minimal(write):
    return write(MINIMAL)
