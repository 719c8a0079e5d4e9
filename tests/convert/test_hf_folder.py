"""Which folder a name means, which of its files are the weights, and whose model it is."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_deft.cli import main
from megatron_deft.convert import hf_folder
from megatron_deft.convert.hf import import_hf
from megatron_deft.convert.hf_folder import INDEX, SINGLE
from megatron_deft.data.tiny import make_tiny_llama
from megatron_deft.errors import UserError
from tests.convert.tiny_models import CONFIGS, make

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("hf") / "model", CONFIGS["llama_gqa_tied"])


@pytest.fixture
def cached(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model as owner/tiny in a Hub cache of its own; its snapshot."""
    store = tmp_path / "cache" / "models--owner--tiny"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text("abc")
    shutil.copytree(model, store / "snapshots" / "abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return store / "snapshots" / "abc"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./missing", "is not a folder: download the model first"),
        ("../missing", "is not a folder"),
        ("hf/miss--ing", "is not a folder"),
        ("hf/.missing", "is not a folder"),
        ("/missing", "is not a folder"),
        ("hf/missing/deep", "is not a folder"),
        ("missing", "is not a folder"),
        ("missing/", "is not a folder"),
        ("", "'' is not a folder: name one"),
        ("hf/missing", r"neither a folder nor a model in the local cache: .*hf download hf/miss"),
    ],
)
def test_a_mistyped_path_is_one_line(
    name: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "import", name, "out"]) == 2
    said = capsys.readouterr().err
    assert re.search(says, said)
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_cached_model_goes_by_its_name_everywhere(
    cached: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hf_folder.find("owner/tiny") == hf_folder.locate("owner/tiny") == cached
    weights = tmp_path / "weights"
    assert main(["convert", "import", "owner/tiny", str(weights), "--no-verify"]) == 0
    assert json.loads((weights / "megatron_deft.json").read_text())["base"] == "owner/tiny"
    assert main(["convert", "verify", "owner/tiny", str(weights)]) == 0
    assert "\nequal\n" in capsys.readouterr().out
    assert main(["convert", "inspect", "owner/tiny"]) == 0
    assert f"{cached}: Hugging Face, whole" in capsys.readouterr().out
    for command in (["inspect", "owner/none"], ["verify", "owner/none", str(weights)]):
        assert main(["convert", *command]) == 2
        assert "owner/none does not exist" in capsys.readouterr().err


def test_a_folder_comes_before_the_cache(
    cached: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, Path("owner/tiny"))
    assert hf_folder.find("owner/tiny") == Path("owner/tiny")


def test_a_single_file_beside_shards_is_refused(tmp_path: Path) -> None:
    """transformers, 4 and 5, takes the single file."""
    folder = make(tmp_path / "hf", CONFIGS["llama_gqa_tied"], max_shard_size="30KB")
    other = make(tmp_path / "other", CONFIGS["llama_gqa_tied"])
    tensors = load_file(other / SINGLE)
    save_file({**tensors, NORM: torch.full((32,), 3.0)}, folder / SINGLE, metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()[NORM]
    assert torch.equal(theirs, torch.full((32,), 3.0))
    says = rf"both {SINGLE} and {INDEX}, which names other files: .* load {SINGLE} alone: keep"
    with pytest.raises(UserError, match=says):
        hf_folder.Weights(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, SINGLE)}))
    assert torch.equal(hf_folder.Weights(folder).load(NORM), theirs)


def test_pickled_weights_are_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    make_tiny_llama(old, ["a cat sat"], layers=1, hidden_size=16)
    torch.save(load_file(old / SINGLE), old / "pytorch_model.bin")
    (old / SINGLE).unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin but no safetensors") as error:
        import_hf(old, tmp_path / "weights")
    remedy = str(error.value).split("transformers, ")[1]
    names = {"OLD": old, "NEW": new, "AutoTokenizer": AutoTokenizer}
    for call in remedy.split(" and "):
        eval(call, {**names, "AutoModelForCausalLM": AutoModelForCausalLM})
    import_hf(new, tmp_path / "weights")
    assert (tmp_path / "weights" / "hf" / "tokenizer.json").is_file()


def test_json_that_python_does_not_take(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text in ('{"a": ' + "9" * 5000 + "}", "[" * 100_000, "\udcff", "[]"):
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match=r"config\.json is not .*: download it again"):
            hf_folder.read_json(path, "config")


@pytest.mark.parametrize(
    ("path", "told", "name"),
    [
        ("/hub/models--org--big-model/snapshots/abc", None, "org/big-model"),
        ("/hub/models--org--big-model/snapshots/abc", "other/model", "org/big-model"),
        ("/models/Model-7b", "org/model-7B", "org/model-7B"),  # downloaded under its own name
        ("/models/my-sft", "org/model", "my-sft"),  # fine-tuned from it
        ("/models/output", "./output", "output"),
        ("/models/output", "../output", "output"),
        ("/models/output", "/tmp/some/output", "output"),
        ("/models/local", ["org/local"], "local"),
        ("/models/local", None, "local"),
    ],
)
def test_base_name(path: str, told: object, name: str) -> None:
    assert hf_folder.base_name(Path(path), {"_name_or_path": told}) == name


def test_a_path_that_reads_like_a_name_is_no_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent.parent)
    path = f"{model.parent.name}/{model.name}"
    assert hf_folder.base_name(model, {"_name_or_path": path}) == "model"


def test_the_name_that_a_user_gives(model: Path, tmp_path: Path) -> None:
    weights, out = tmp_path / "weights", tmp_path / "out"
    args = ["--no-verify", "--base", "owner/known"]
    assert main(["convert", "import", str(model), str(weights), *args]) == 0
    assert main(["convert", "export", str(weights), str(out), "--no-verify"]) == 0
    assert "base_model: owner/known\n" in (out / "README.md").read_text()
