"""What a folder is, told from its headers: every kind, whole and damaged."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_deft.checkpoint_folder import read_manifest
from megatron_deft.cli import main
from megatron_deft.config import load_config
from megatron_deft.convert.hf import import_hf
from megatron_deft.convert.inspect import describe, inspect
from megatron_deft.convert.mapping import TIED_COPY
from megatron_deft.errors import UserError
from megatron_deft.training.run import run
from tests.convert.tiny_models import CONFIGS, make


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CONFIGS["llama_biases_odd_vocab"]
    return make(tmp_path_factory.mktemp("hf") / "model", config, torch.bfloat16)


@pytest.fixture(scope="module")
def weights(source: Path) -> Path:
    return import_hf(source, source.parent / "weights", verify=False)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    root = tmp_path_factory.mktemp("trained")
    (root / "empty.yaml").write_text("{}\n")
    settings: dict[str, Any] = {
        "run_dir": root / "run",
        "objective": "dft",
        "model.load": base / "megatron",
        "data.train_files": f"[{base / 'train.jsonl'}]",
        "data.show_sample": "false",
        "train.global_batch": 4,
        "train.steps": 2,
        "monitor.tensorboard": "false",
    }
    with redirect_stdout(StringIO()):
        run(load_config(root / "empty.yaml", [f"{k}={v}" for k, v in settings.items()]))
    return root / "run"


def test_a_hugging_face_folder(source: Path) -> None:
    found = inspect(source)
    assert (found.kind, found.problems, found.convertible) == ("Hugging Face", [], None)
    stored = load_file(source / "model.safetensors")
    assert {e.name: (e.shape, e.bytes) for e in found.tensors} == {
        name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in stored.items()
    }
    assert {e.dtype for e in found.tensors} == {"bfloat16"}
    text = describe(found)
    assert text.startswith(f"{source}: Hugging Face, whole\n")
    lines = {" ".join(line.split()) for line in text.splitlines()}
    count = sum(t.numel() for t in stored.values())
    assert lines >= {
        "family llama",
        "layers 4",
        "hidden size 32, MLP 48",
        "heads 4 of 8, 2 of keys and values",
        "vocabulary 1003",
        f"parameters {count:,} ({2 * count:,} bytes; bfloat16)",
    }
    assert "theta 5000, llama3 scaling (factor 8, low_freq_factor 1" in text
    assert "model.norm.weight" not in text
    assert describe(found, tensors=True).splitlines()[-1].split() == [
        "model.norm.weight", "bfloat16", "[32]",
    ]  # fmt: skip


def test_imported_weights(source: Path, weights: Path) -> None:
    found = inspect(weights, checksums=True)
    assert (found.kind, found.problems, found.optimizer) == ("imported weights", [], [])
    assert found.origin == {"base": "model", "tokenizer": "none"}
    hf = inspect(source)
    assert found.architecture == hf.architecture
    assert sum(e.bytes for e in found.tensors) == sum(e.bytes for e in hf.tensors)
    assert describe(found).startswith(f"{weights}: imported weights, whole, every checksum right\n")


def test_a_run(trained: Path) -> None:
    found = inspect(trained)
    step = trained / "checkpoints" / "step_00000002"
    assert (found.path, found.kind, found.problems) == (str(step), "training checkpoint", [])
    assert found.origin["step"] == 2
    assert found.origin["objective"] == "dft"
    assert found.origin["samples"] == 8
    sizes = ("tensor", "pipeline", "virtual", "expert", "expert_tensor", "data")
    assert found.origin["layout"] == dict.fromkeys(sizes, 1)
    assert found.origin["data"][0].endswith("train.jsonl")
    assert found.optimizer
    values = {e.name: e for e in found.tensors}
    assert values["decoder.final_layernorm.weight"].shape == (32,)
    text = describe(found)
    assert (
        "layout           tensor 1, pipeline 1, virtual 1, expert 1, expert_tensor 1, data 1"
        in text
    )
    assert "optimizer state  " in text
    assert "optimizer state  none" not in text


def test_damage(weights: Path, source: Path, tmp_path: Path) -> None:
    flipped = tmp_path / "flipped"
    shutil.copytree(weights, flipped)
    (file,) = (flipped / "state").glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    assert inspect(flipped).problems == []
    (problem,) = inspect(flipped, checksums=True).problems
    assert problem.endswith("does not match its checksum")

    for name in (".metadata", file.name):
        cut = tmp_path / name.strip(".")
        shutil.copytree(weights, cut)
        path = cut / "state" / name
        path.write_bytes(path.read_bytes()[:-5])
        found = inspect(cut)
        assert len(found.problems) == 1
        assert f"{cut}: imported weights, NOT WHOLE" in describe(found, tensors=True)
        assert bool(found.tensors) == (name != ".metadata")

    hf = tmp_path / "hf"
    shutil.copytree(source, hf)
    (hf / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-5])
    found = inspect(hf)
    assert "model.safetensors" in found.problems[0]
    assert found.architecture["num_layers"] == 4


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    stored = load_file(file)
    change(stored)
    save_file(stored, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: [t.pop(name) for name in list(t) if ".layers.3." in name],
            r"misses model\.layers\.3\..* and \d+ more: not a llama model of 4 layers",
        ),
        (lambda t: t.update(more=torch.ones(1)), r"has unexpected more"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"model\.norm\.weight has shape \[31\], config\.json says \[32\]",
        ),
    ],
)
def test_tensors_are_held_against_the_config(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Tensor]], object],
    says: str,
) -> None:
    shutil.copytree(source, tmp_path / "hf")
    edit(tmp_path / "hf", change)
    assert main(["convert", "inspect", str(tmp_path / "hf")]) == 1
    said = capsys.readouterr().out
    assert f"{tmp_path / 'hf'}: Hugging Face, NOT WHOLE\n" in said
    assert re.search(rf"problem +.*{says}", said)


def test_a_tied_head_stored_twice_is_whole(tmp_path: Path) -> None:
    folder = make(tmp_path / "hf", CONFIGS["llama_gqa_tied"])
    copy, embedding = TIED_COPY
    angles = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda t: t.update({copy: t[embedding].clone(), angles: torch.ones(4)}))
    assert inspect(folder).problems == []


def test_pickled_weights_are_to_be_converted_first(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    assert main(["convert", "inspect", str(tmp_path / "hf")]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'hf'}: Hugging Face, weights not looked into\n" in said
    assert re.search(r"not convertible +.*pytorch_model\.bin but no safetensors: convert it", said)
    assert "parameters" not in said
    (tmp_path / "hf" / "pytorch_model.bin").rename(tmp_path / "hf" / "training_args.bin")
    (problem,) = inspect(tmp_path / "hf").problems
    assert "has no model.safetensors" in problem


def test_a_missing_tokenizer_is_shown(source: Path, weights: Path, base: Path) -> None:
    for folder in (source, weights):
        assert re.search(r"^  tokenizer +none$", describe(inspect(folder)), re.MULTILINE)
    for folder in (base / "hf", base / "megatron"):
        assert "tokenizer" not in describe(inspect(folder))


def test_a_config_of_odd_values_is_no_traceback(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    odd = {**config, "rope_scaling": [1], "num_hidden_layers": None, "vocab_size": {"a": [None]}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(odd))
    found = inspect(tmp_path / "hf")
    assert "must be" in (found.convertible or "")
    assert "layers           None" in describe(found)


def test_a_spec_that_lacks_a_field_is_one_line(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "w")
    path = tmp_path / "w" / "megatron_deft.json"
    manifest = read_manifest(tmp_path / "w")
    del manifest["spec"]["num_layers"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"missing fields \['num_layers'\]"):
        inspect(tmp_path / "w")


def test_a_family_that_cannot_be_converted(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "model_type": "other"}))
    found = inspect(tmp_path / "hf")
    assert found.problems == []
    assert "'other' is not one of" in (found.convertible or "")
    assert found.architecture["num_query_groups"] == 2
    assert "not convertible" in describe(found)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither"):
        inspect(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        inspect(tmp_path / "none")


def test_the_command(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "inspect", str(weights)]) == 0
    assert "imported weights, whole\n" in capsys.readouterr().out
    assert main(["convert", "inspect", str(weights), "--json", "--tensors"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "imported weights"
    assert data["parameters"]["dtypes"].keys() == {"bfloat16"}
    assert data["optimizer"] is None
    assert {"name": "decoder.final_layernorm.weight", "shape": [32], "dtype": "bfloat16",
            "bytes": 64} in data["tensors"]  # fmt: skip
    assert main(["convert", "inspect", str(weights), "--json"]) == 0
    assert "tensors" not in json.loads(capsys.readouterr().out)
    shutil.copytree(weights, tmp_path / "cut")
    (tmp_path / "cut" / "hf" / "config.json").unlink()
    assert main(["convert", "inspect", str(tmp_path / "cut")]) == 1
    assert "hf/config.json is missing" in capsys.readouterr().out
