"""What all tests share: a tiny base model and data, and how several workers divide the work."""

import json
import os
from pathlib import Path

import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))  # 0: a pytest without workers
if WORKERS:
    # Before torch is imported: threads beyond a worker's share of the cores wait by spinning.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
# Workers take whole files: these, which last longest, first, lest one end long after the others.
LONGEST = (
    "training/test_restarts",
    "training/test_multinode",
    "training/test_trainer",
    "training/test_layouts",
    "training/test_matrix",
    "training/test_stopping",
    "training/test_start_and_end",
    "training/test_lora",
    "training/test_fused_linear",
    "training/test_offload",
    "training/test_lora_run",
    "training/test_disk_full",
    "loss/test_attach_fused",
    "data/prepare/test_tokenise",
    "training/test_heads",
    "training/test_data",
    "models/test_layouts",
    "convert/test_layouts",
    "convert/test_interrupted",
    "one_click/test_script",
    "test_quickstart",
    "integrations/test_transformers",
    "test_readme",
    "csrc/test_cuda_compiles",
    "training/test_exports",
    "convert/test_verify",
    "convert/test_verify_layers",
    "csrc/test_cuda_emulated",
    "ops/test_ops",
    "platform/test_parallel",
    "loss/test_random_cases",
    "convert/test_hf",
    "data/prepare/test_sources",
    "models/test_packed",
    "evaluation/test_general",
    "report/test_browser",
    "report/test_write",
    "benchmarks/test_convert",
    "benchmarks/test_data",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of LONGEST first, in its order, where there are workers."""
    if WORKERS:
        place = {f"tests/{name}.py": number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


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
