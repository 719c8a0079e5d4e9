"""NeMo 2 checkpoints without NeMo: read as NeMo lays them out, all else refused.

nemo_llama.yaml is the context/model.yaml that NeMo 2.7.3 wrote of a Llama, without the optimizer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_deft import cli
from megatron_deft.checkpoint_folder import read_manifest
from megatron_deft.convert import nemo
from megatron_deft.convert.hf import export_hf, import_hf
from megatron_deft.convert.nemo_folder import State, is_nemo, models_cache
from megatron_deft.convert.nemo_models import MODELS, NEMO_CLASSES, hf_config, nemo_config
from megatron_deft.convert.state import write_state
from megatron_deft.convert.streams import progress_bar
from megatron_deft.errors import UserError
from megatron_deft.integrations import nemo_checkpoint
from megatron_deft.models.families import ModelSpec, spec_from_hf
from tests.convert.tiny_models import CONFIGS, assert_same_tensors, make, tensors

RECORDED = Path(__file__).with_name("nemo_llama.yaml")


def write_nemo(folder: Path, weights: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """What NeMo would have saved of the Llama in `weights`."""
    spec = ModelSpec.from_json(read_manifest(weights)["spec"])
    model = yaml.safe_load(RECORDED.read_text())
    model["config"] |= nemo_config(spec)[2]
    model["tokenizer"] = None
    for key, value in (changes or {}).items():
        (model if key in model else model["config"])[key] = value
    (folder / "context").mkdir(parents=True)
    (folder / "context" / "model.yaml").write_text(yaml.safe_dump(model))
    chunks = nemo._chunks(State(weights / "state", spec), None, nemo._nemo_key)
    write_state(folder / "weights", chunks, progress_bar("", 0))
    nemo._add_objects(folder / "weights", nemo._extra_states(spec))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with hf/ and weights/ of a Llama."""
    root = tmp_path_factory.mktemp("llama")
    make(root / "hf", CONFIGS["llama_mha_untied"])
    import_hf(root / "hf", root / "weights", verify=False)
    return root


def test_import_by_name(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEMO_MODELS_CACHE", raising=False)
    monkeypatch.setenv("NEMO_HOME", str(tmp_path))
    write_nemo(tmp_path / "models" / "meta" / "tiny", llama / "weights")
    assert cli.main(["convert", "import", "nemo://meta/tiny", str(tmp_path / "out")]) == 0
    export_hf(tmp_path / "out", tmp_path / "hf")
    assert_same_tensors(tensors(tmp_path / "hf"), tensors(llama / "hf"))
    specs = [read_manifest(f)["spec"] for f in (tmp_path / "out", llama / "weights")]
    assert specs[0] == specs[1]

    monkeypatch.setenv("NEMO_MODELS_CACHE", str(tmp_path / "other"))
    assert models_cache() == tmp_path / "other"


@pytest.mark.parametrize(
    "name",
    [n for n, c in CONFIGS.items() if c.model_type in NEMO_CLASSES and n not in {
        "llama_yarn", "qwen2_windows", "qwen3_moe_mixed", "llama_biases_odd_vocab"
    }],
)  # fmt: skip
def test_config_there_and_back(name: str) -> None:
    spec = spec_from_hf(json.loads(CONFIGS[name].to_json_string()))
    model, _, arguments = nemo_config(spec)
    assert MODELS[model.name] is model
    assert arguments["vocab_size"] == spec.vocab_size


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("llama_yarn", "attention_scale, rope_scaling"),
        ("qwen2_windows", "window, window_layers"),
        ("qwen3_moe_mixed", "expert_layers"),
        ("phi3_partial", "family 'phi3'"),
    ],
)
def test_what_nemo_cannot_hold_is_not_exported(name: str, lost: str) -> None:
    spec = spec_from_hf(json.loads(CONFIGS[name].to_json_string()))
    with pytest.raises(UserError, match=lost):
        nemo_config(spec)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "class": ({"_target_": "nemo.x.NemotronModel"}, "NemotronModel is not supported: legal are"),
    "activation": ({"activation_func": {"_target_": "a.relu"}}, "activation_func 'a.relu'"),
    "latent": ({"multi_latent_attention": True}, "multi_latent_attention True"),
    "rotary": ({"rotary_percent": 0.5}, "rotary_percent 0.5"),
    "adapter": ({"model_transform": {"_target_": "nemo.LoRA"}}, "adapter checkpoint .nemo.LoRA"),
    "layers": ({"num_layers": 3}, "shape .4, .* the config says .3, "),
    "vocabulary": ({"vocab_size": None}, "size of the vocabulary"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_of_the_model(case: str, llama: Path, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    folder = write_nemo(tmp_path / "nemo", llama / "weights", changes)
    with pytest.raises(UserError, match=message) as caught:
        nemo.import_nemo(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_refusals_of_the_folder(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_MODELS_CACHE", str(tmp_path))
    folder = write_nemo(tmp_path / "nemo", llama / "weights")

    def message(source: str | Path) -> str:
        with pytest.raises(UserError) as caught:
            nemo.import_nemo(source, tmp_path / "out")
        return str(caught.value)

    assert f"is not in {tmp_path} (there are nemo)" in message("nemo://absent")
    (tmp_path / "old.nemo").write_bytes(b"tar")
    assert is_nemo(tmp_path / "old.nemo")
    assert "NeMo 1 checkpoint" in message(tmp_path / "old.nemo")
    (folder / "weights" / "adapter_metadata.json").write_text("{}")
    assert "merge_lora" in message(folder)
    (folder / "weights" / "adapter_metadata.json").unlink()
    (folder / "weights" / ".metadata").unlink()
    assert "the weights are missing" in message(folder)
    (folder / "context" / "model.yaml").unlink()
    assert "model.yaml is missing" in message(folder)


def test_hugging_face_folders_are_no_nemo(llama: Path) -> None:
    assert not is_nemo(llama / "hf")
    assert not is_nemo(llama / "absent")


def test_export_names_what_to_install(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nemo", None)
    weights, out = str(llama / "weights"), tmp_path / "out"
    assert cli.main(["convert", "export", weights, str(out), "--format", "nemo"]) == 2
    assert nemo_checkpoint.INSTALL in capsys.readouterr().err
    assert not out.exists()


def test_rope_of_two_kinds_is_refused() -> None:
    config = yaml.safe_load(RECORDED.read_text())["config"]
    config = {k: v["_target_"] if isinstance(v, dict) else v for k, v in config.items()}
    with pytest.raises(UserError, match="both set"):
        hf_config("LlamaModel", {**config, "scale_factor": 8, "seq_len_interpolation_factor": 2.0})
