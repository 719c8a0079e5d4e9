"""Checkpoints that NeMo 2 itself wrote, and ours that NeMo 2 itself reads."""

from pathlib import Path

import pytest
import torch

from megatron_deft.convert.hf import export_hf, import_hf
from megatron_deft.convert.nemo import export_nemo, import_nemo
from megatron_deft.convert.nemo_folder import Nemo
from tests.convert.tiny_models import CONFIGS, assert_same_tensors, logits, make, tensors
from tests.nemo.conftest import REASON, has_nemo

pytestmark = pytest.mark.skipif(not has_nemo(), reason=REASON)

NAMES = (
    "llama", "llama31_tied_bf16", "mistral_padded", "qwen2", "qwen3_tied", "qwen3_moe", "mixtral",
)  # fmt: skip
IDS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Path]:
    """Checkpoints of NeMo by name."""
    from tests.nemo import real

    root = tmp_path_factory.mktemp("saved")
    found = {}
    for name, (model, config) in real.models().items():
        real.save(root / name, model, config, tokenizer)
        found[name] = root / name
    assert tuple(found) == NAMES
    return found


@pytest.mark.parametrize("name", NAMES)
def test_import_equals_nemos_own_export(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    from tests.nemo import real

    import_nemo(saved[name], tmp_path / "weights")
    export_hf(tmp_path / "weights", tmp_path / "hf")  # which compares logits with transformers

    theirs, config = real.exported(saved[name])
    assert_same_tensors(tensors(tmp_path / "hf"), theirs)
    ours = Nemo(saved[name]).config
    known = {key: getattr(config, key) for key in ours if hasattr(config, key)}
    assert {key: ours[key] for key in known if key != "rope_scaling"} == {
        key: value for key, value in known.items() if key != "rope_scaling"
    }


@pytest.mark.parametrize("name", NAMES)
def test_model_computes_what_nemo_computes(
    name: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    from tests.nemo import real

    import_nemo(saved[name], tmp_path / "weights", dtype="fp32")
    export_hf(tmp_path / "weights", tmp_path / "hf", verify=False)
    _, theirs = real.load(saved[name], IDS)
    ours = logits(tmp_path / "hf", IDS)
    tolerance = 5e-2 if theirs.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(
        ours, theirs[..., : ours.shape[-1]].float(), atol=tolerance, rtol=tolerance
    )
