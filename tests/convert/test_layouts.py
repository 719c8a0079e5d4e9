"""An imported state loads at any TP x PP layout and padding; what such ranks save is exported."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert.hf import export_hf, import_hf
from megatron_deft.convert.state import StateReader
from tests.convert.ranks import GRID, IDS, RUNS, Layout, Runs, run_dir, run_layouts
from tests.convert.tiny_models import CONFIGS, assert_same_tensors, logits, make, tensors
from tests.distributed import run_ranks

# One of each family, with as many key-value heads as the widest layout has ranks.
FAMILIES = {config.model_type: case for case, config in CONFIGS.items()}
WIDE: Runs = {f"wide {case}": GRID for case in FAMILIES.values()}
ALL = [
    (case, layout) for runs in (RUNS, WIDE) for case, layouts in runs.items() for layout in layouts
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    for case in (*RUNS, *WIDE):
        config = deepcopy(CONFIGS[case.removeprefix("wide ")])
        if case in WIDE:
            config.num_key_value_heads = 4
        source = make(root / case / "hf", config)
        import_hf(source, root / case / "weights", verify=False)
    return root


Results = Mapping[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(root: Path) -> Results:
    """What every rank found, by model and layout."""
    found: dict[str, list[dict[str, Any]]] = {}
    for world_size, runs in ((4, RUNS), (8, WIDE)):
        results = run_ranks(world_size, run_layouts, root, runs)
        found |= {key: [rank[key] for rank in results] for key in results[0]}
    return found


def test_every_family_is_there() -> None:
    families = {CONFIGS[case].model_type for case in RUNS}
    assert families == set(FAMILIES)
    assert {(layout.tensor, layout.pipeline) for layout in GRID} == {
        (1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)
    }  # fmt: skip


@pytest.mark.parametrize(("case", "layout"), ALL)
def test_logits_at_every_layout(root: Path, ranks: Results, case: str, layout: Layout) -> None:
    found = ranks[f"{case} {layout}"]
    reference = logits(root / case / "hf", IDS)
    multiple = layout.pad * layout.tensor
    padded = -(-reference.shape[-1] // multiple) * multiple
    for replica in range(len(found) // (layout.tensor * layout.pipeline)):
        last = [r for r in found if r["data"] == replica and r["shard"] is not None]
        last.sort(key=lambda r: r["tensor"])
        whole = torch.cat([r["shard"] for r in last], dim=-1)
        assert whole.shape[-1] == padded
        difference = (whole[..., : reference.shape[-1]] - reference).abs().max()
        assert difference <= 1e-5 * reference.abs().max()
    assert all(r["direct_is_imported"] for r in found), "load_hf"
    assert all(r["padding_is_zero"] for r in found)
    assert (padded > reference.shape[-1]) == any(r["padded_rows"] for r in found)


def exported(root: Path, layout: Layout, out: Path) -> Path:
    """The Hugging Face folder of what the ranks of that layout saved."""
    run = run_dir(root, layout)
    hf = folders.resolve(run) / "hf"
    hf.mkdir(exist_ok=True)
    (hf / "config.json").write_bytes((root / "weights" / "hf" / "config.json").read_bytes())
    return export_hf(run, out, verify=False)


@pytest.mark.parametrize(("case", "layout"), ALL)
def test_a_checkpoint_of_ranks_is_exported_bit_for_bit(
    root: Path, ranks: Results, case: str, layout: Layout, tmp_path: Path
) -> None:
    out = exported(root / case, layout, tmp_path / "out")
    assert_same_tensors(tensors(out), tensors(root / case / "hf"))
    assert "- Objective: deft" in (out / "README.md").read_text()


def test_tied_embeddings_under_pipeline_parallel(
    root: Path, ranks: Results, tmp_path: Path
) -> None:
    """The last stage has a table of its own, equal to the first one's; an export has one."""
    case, layout = "llama_gqa_tied", Layout(1, 2, pad=7)
    tables = [table for rank in ranks[f"{case} {layout}"] for table in rank["tables"]]
    assert len(tables) == 4, "two replicas of two stages"
    assert all(torch.equal(table, tables[0]) for table in tables)
    found = tensors(exported(root / case, layout, tmp_path / "out"))
    assert "lm_head.weight" not in found
    assert torch.equal(found["model.embed_tokens.weight"], tables[0][:260])


def test_a_padded_vocabulary_is_not_padded_again(
    root: Path, ranks: Results, tmp_path: Path
) -> None:
    """Rows of padding are the layout's: no folder holds them, whichever way it goes."""
    case, layout = "llama_gqa_tied", Layout(2, 2, pad=256)
    assert sum(rank["padded_rows"] for rank in ranks[f"{case} {layout}"]) == 2 * (512 - 260)
    folder = exported(root / case, layout, tmp_path / "first")
    for turn in ("second", "third"):
        weights = import_hf(folder, tmp_path / f"weights {turn}")
        stored = StateReader(weights / "state").tensors["embedding.word_embeddings.weight"]
        assert tuple(stored.size) == (260, 32)
        folder = export_hf(weights, tmp_path / turn)
        assert tensors(folder)["model.embed_tokens.weight"].shape == (260, 32)
