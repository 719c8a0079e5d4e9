"""Checkpoints that NeMo 2 itself wrote, and ours that NeMo 2 itself reads."""

import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from megatron_deft.checkpoint_folder import read_manifest
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
    found = tensors(tmp_path / "hf")
    assert_same_tensors({key: value.float() for key, value in found.items()}, theirs)
    ours = Nemo(saved[name]).config
    # of which NeMo's exporters write constants, some of them of another model
    constant = {"architectures", "bos_token_id", "eos_token_id", "attention_bias", "mlp_bias"}
    for key in ours.keys() - constant:
        assert ours[key] == getattr(config, key, None), key


@pytest.mark.parametrize("name", NAMES)
def test_model_computes_what_nemo_computes(
    name: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    from tests.nemo import real

    import_nemo(saved[name], tmp_path / "weights", dtype="fp32")
    export_hf(tmp_path / "weights", tmp_path / "hf", verify=False)
    _, theirs = real.load(saved[name], IDS)
    ours = logits(tmp_path / "hf", IDS)
    torch.testing.assert_close(ours, theirs[..., : ours.shape[-1]], atol=2e-5, rtol=2e-5)


def hugging_face(name: str, folder: Path, tokenizer: Path) -> Path:
    """A random model of the tokenizer's vocabulary, with the tokenizer."""
    config = deepcopy(CONFIGS[name])
    config.vocab_size = 301
    if config.model_type == "llama":  # the spelling that transformers 4 knows
        config.rope_theta = 700.0
    make(folder, config)
    for path in tokenizer.iterdir():
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "llama_mha_untied", "llama_gqa_tied", "mistral_wide_heads", "qwen2_biases",
        "qwen2_mqa_tied", "qwen3_tied", "qwen3_moe", "mixtral", "gemma2",
    ],
)  # fmt: skip
def test_nemo_reads_what_is_exported(name: str, tmp_path: Path, tokenizer: Path) -> None:
    from tests.nemo import real

    hf = hugging_face(name, tmp_path / "hf", tokenizer)
    import_hf(hf, tmp_path / "weights", verify=False)
    export_nemo(tmp_path / "weights", tmp_path / "nemo")

    theirs, _ = real.exported(tmp_path / "nemo")
    original = tensors(hf)
    if name == "qwen2_mqa_tied":  # NeMo's connectors know no tied Qwen 2
        original["lm_head.weight"] = original["model.embed_tokens.weight"]
    assert_same_tensors(theirs, original)

    if name in ("qwen3_moe", "mixtral", "gemma2"):
        return  # these NeMo builds as they are stored only where TransformerEngine is
    _, found = real.load(tmp_path / "nemo", IDS)
    torch.testing.assert_close(found, logits(hf, IDS), atol=2e-5, rtol=2e-5)


def test_export_and_back(tmp_path: Path, tokenizer: Path) -> None:
    hf = hugging_face("gemma2", tmp_path / "hf", tokenizer)
    import_hf(hf, tmp_path / "weights", verify=False)
    export_nemo(tmp_path / "weights", tmp_path / "nemo", dtype="bf16")
    import_nemo(tmp_path / "nemo", tmp_path / "back")
    export_hf(tmp_path / "back", tmp_path / "again", verify=False)

    expected = {key: value.bfloat16() for key, value in tensors(hf).items()}
    assert_same_tensors(tensors(tmp_path / "again"), expected)
    specs = [read_manifest(tmp_path / f)["spec"] for f in ("weights", "back")]
    assert specs[0] == specs[1]
