"""An imported state loads at any TP x PP layout and padding; what such ranks save is exported."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert.hf import export_hf, import_hf
from tests.convert.ranks import IDS, RUNS, Layout, run_layouts
from tests.convert.tiny_models import CONFIGS, assert_same_tensors, logits, make, tensors
from tests.distributed import run_ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    for case in RUNS:
        source = make(root / case / "hf", CONFIGS[case])
        import_hf(source, root / case / "weights", verify=False)
    return root


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[str, Any]]:
    return run_ranks(4, run_layouts, root)


LAYOUTS = [(case, layout) for case, layouts in RUNS.items() for layout in layouts]


def test_every_model_has_its_layouts() -> None:
    families = {CONFIGS[case].model_type for case in RUNS}
    assert families == {config.model_type for config in CONFIGS.values()}


@pytest.mark.parametrize(("case", "layout"), LAYOUTS)
def test_logits_at_every_layout(
    root: Path, ranks: list[dict[str, Any]], case: str, layout: Layout
) -> None:
    found = [rank[f"{case} {layout}"] for rank in ranks]
    reference = logits(root / case / "hf", IDS)
    multiple = layout.pad * layout.tensor
    padded = -(-reference.shape[-1] // multiple) * multiple
    for replica in range(4 // (layout.tensor * layout.pipeline)):
        last = [r for r in found if r["data"] == replica and r["shard"] is not None]
        last.sort(key=lambda r: r["tensor"])
        whole = torch.cat([r["shard"] for r in last], dim=-1)
        assert whole.shape[-1] == padded
        difference = (whole[..., : reference.shape[-1]] - reference).abs().max()
        assert difference <= 1e-5 * reference.abs().max()
    assert all(r["direct_is_imported"] for r in found), "load_hf"
    assert all(r["padding_is_zero"] for r in found)
    assert (padded > reference.shape[-1]) == any(r["padded_rows"] for r in found)


@pytest.mark.parametrize("case", RUNS)
def test_a_checkpoint_of_ranks_is_exported_bit_for_bit(
    root: Path, ranks: list[dict[str, Any]], case: str, tmp_path: Path
) -> None:
    run = root / case / "run"
    step = folders.resolve(run)
    (step / "hf").mkdir(exist_ok=True)
    config = root / case / "weights" / "hf" / "config.json"
    (step / "hf" / "config.json").write_bytes(config.read_bytes())
    out = export_hf(run, tmp_path / "out")
    assert_same_tensors(tensors(out), tensors(root / case / "hf"))
    assert "- Objective: deft" in (out / "README.md").read_text()
