"""Sets of random tokens are whole sets."""

from pathlib import Path

import pytest

from megatron_deft.data import synthetic
from megatron_deft.data.indexed import open_set
from megatron_deft.data.synthetic import make_synthetic_set


@pytest.mark.parametrize(("vocab_size", "dtype"), [(300, "uint16"), (150_000, "int32")])
def test_a_set_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int, dtype: str
) -> None:
    monkeypatch.setattr(synthetic, "_BLOCK", 300)
    manifest = make_synthetic_set(tmp_path / "set", 1000, mean_length=20, vocab_size=vocab_size)
    data = open_set(tmp_path / "set")
    assert data.manifest == manifest
    assert (len(data), manifest["token_dtype"]) == (1000, dtype)
    assert (data.lengths.min(), data.lengths.max()) == (2, 38)
    assert abs(data.lengths.mean() - 20) < 1
    sample = data[999]
    assert len(sample.tokens) == data.lengths[999]
    assert 0 <= sample.tokens.min() <= sample.tokens.max() < vocab_size
    assert set(sample.weights.tolist()) <= {0, 1}
    make_synthetic_set(tmp_path / "again", 1000, mean_length=20, vocab_size=vocab_size)
    for name in ("tokens.bin", "tokens.idx", "weights.bin"):
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
