"""A tiny base model and data that the tests of whole runs share."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, val.jsonl, hf/ (tiny Llama, vocabulary 301) and megatron/."""
    from megatron_deft.convert.hf import import_hf
    from megatron_deft.data.tiny import make_tiny_llama

    root = tmp_path_factory.mktemp("base")
    rows = [
        {
            "extra_info": {
                "question": f"what is {i} plus {i}?",
                "answer": f"it is {2 * i}" * (i % 3 + 1),
            }
        }
        for i in range(64)
    ]
    texts = [json.dumps(row) for row in rows]
    (root / "train.jsonl").write_text("\n".join(texts))
    (root / "val.jsonl").write_text("\n".join(texts[:13]))
    make_tiny_llama(
        root / "hf", texts, vocab_size=301, hidden_size=32, layers=2, heads=4, kv_heads=2, seed=3
    )
    import_hf(root / "hf", root / "megatron", verify=False)
    return root
