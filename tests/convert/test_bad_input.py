"""What is wrong with a folder is one line and exit code 2, and nothing is written."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from megatron_deft.checkpoint_folder import verify
from megatron_deft.cli import main
from megatron_deft.convert.hf import export_hf, import_hf
from megatron_deft.convert.hf_folder import INDEX
from megatron_deft.convert.safetensors_io import header_bytes
from megatron_deft.data.tiny import make_tiny_llama
from megatron_deft.errors import UserError
from tests.convert.tiny_models import CONFIGS, make

FIRST = "model-00001-of-"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In shards, as large models come."""
    root = tmp_path_factory.mktemp("bad")
    return make(root / "hf", CONFIGS["llama_gqa_tied"], max_shard_size="30KB")


@pytest.fixture(scope="module")
def weights(model: Path) -> Path:
    return import_hf(model, model.parent / "weights", verify=False)


def shard(folder: Path) -> Path:
    return next(folder.glob(f"{FIRST}*"))


def truncate(folder: Path) -> None:
    os.truncate(shard(folder), shard(folder).stat().st_size - 1)


def no_header(folder: Path) -> None:
    os.truncate(shard(folder), 4)


def empty_file(folder: Path) -> None:
    os.truncate(shard(folder), 0)


def absent(folder: Path) -> None:
    shard(folder).unlink()


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return edit


def index_text(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(text)


def norm(value: torch.Tensor) -> Callable[[Path], None]:
    """Another final norm."""

    def edit(folder: Path) -> None:
        path = folder / json.loads((folder / INDEX).read_text())["weight_map"]["model.norm.weight"]
        save_file(load_file(path) | {"model.norm.weight": value}, path, metadata={"format": "pt"})

    return edit


def config(**fields: object) -> Callable[[Path], None]:
    """Other fields of config.json."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def larger_tokenizer(folder: Path) -> None:
    """One of 259 tokens, and two added: 261 for 260 embeddings."""
    made = make_tiny_llama(folder / "made", [], vocab_size=259, hidden_size=16, layers=1)
    tokenizer = Tokenizer.from_file(str(made / "tokenizer.json"))
    tokenizer.add_tokens(["<one>", "<more>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.rmtree(made)


def larger_tokenizer_config(folder: Path) -> None:
    """As transformers 4 leaves a token that someone added by hand."""
    larger_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    del tokenizer["added_tokens"][-1]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    added = {"added_tokens_decoder": {"260": {"content": "<late>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(added))


SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, rf"{FIRST}.* is damaged \(.*\): download it again"),
    "header cut": (no_header, rf"{FIRST}.* is damaged \(.*\): download it again"),
    "empty file": (empty_file, rf"{FIRST}.* is damaged \(.*\): download it again"),
    "missing shard": (absent, rf"{FIRST}.* is missing though {INDEX} names it: download it again"),
    "index names an absent file": (
        index(lambda files: files.update({"model.norm.weight": "model-9.safetensors"})),
        rf"model-9\.safetensors is missing though {INDEX} names it",
    ),
    "index names an absent tensor": (
        index(lambda files: files.update({"model.more": next(iter(files.values()))})),
        r"disagree about model\.more: download them again",
    ),
    "index without a map": (index_text("{}"), rf"{INDEX} has no weight_map"),
    "index with a list": (index_text('{"weight_map": [1]}'), rf"{INDEX} has no weight_map"),
    "index of nothing": (index_text('{"weight_map": {}}'), rf"{INDEX} names no tensor"),
    "index cut": (index_text('{"weight'), rf"{INDEX} is not readable JSON"),
    "dtype": (
        norm(torch.ones(32, dtype=torch.int8)),
        r"model\.norm\.weight is stored as I8, legal are F64, F32, F16, BF16: start from the un",
    ),
    "8-bit floats": (
        norm(torch.ones(32).to(torch.float8_e4m3fn)),
        r"model\.norm\.weight is stored as F8_E4M3, legal are",
    ),
    "shape": (
        norm(torch.ones(2, 16)),
        r"model\.norm\.weight has shape \[2, 16\], config\.json says \[32\]",
    ),
    "unknown architecture": (
        config(model_type="mamba2", architectures=["Mamba2ForCausalLM"]),
        r"model_type 'mamba2' is not one of gemma2, .*, qwen3_moe",
    ),
    "another head": (
        config(architectures=["LlamaForSequenceClassification"]),
        r"architectures \['LlamaForSequenceClassification'\] is not supported: only LlamaForCausal",
    ),
    "quantised": (
        config(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"}),
        r"quantization_config .*'fp8'.* is not supported: only absent: start from whole weights",
    ),
    "tokenizer beyond the embeddings": (
        larger_tokenizer,
        r"tokenizer\.json: the vocabulary has 261 tokens \(the last is '<more>'\), vocab_size in "
        r"config\.json is 260",
    ),
    "tokens added beyond the embeddings": (
        larger_tokenizer_config,
        r"the vocabulary has 261 tokens \(the last is '<late>'\)",
    ),
    "tokenizer cut": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model": '),
        r"tokenizer\.json is damaged \(.*\): download it again",
    ),
}


@pytest.mark.parametrize("proof", [[], ["--no-verify"]], ids=["verify", "no-verify"])
@pytest.mark.parametrize("case", sorted(SOURCES))
def test_a_damaged_model_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, proof: list[str]
) -> None:
    damage, says = SOURCES[case]
    shutil.copytree(model, tmp_path / "hf")
    damage(tmp_path / "hf")
    assert main(["convert", "import", str(tmp_path / "hf"), str(tmp_path / "out"), *proof]) == 2
    said = capsys.readouterr().err
    assert re.search(says, said), said
    assert said.count("\n") == 1
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_target_that_exists_is_one_line(
    model: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], direction: str
) -> None:
    source = model if direction == "import" else weights
    (tmp_path / "out").mkdir()
    assert main(["convert", direction, str(source), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "out exists already: name another folder or pass --overwrite" in said
    assert said.count("\n") == 1
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize(
    ("direction", "source", "out", "says"),
    [
        ("export", "weights", "weights/hf", "weights/hf lies in the source"),
        ("export", "weights", "weights/state/new", "weights/state/new lies in the source"),
        ("export", "weights", "link", "link lies in the source"),
        ("export", "weights", ".", "holds the source"),
        ("export", "weights", "other/hf", r"other/hf lies in .*/other, .* of its own"),
        ("import", "hf", "other/hf/new", r"other/hf/new lies in .*/other, .* of its own"),
        ("import", "hf", "hf/weights", "hf/weights lies in the source"),
        ("import", "hf", "hf", "hf holds the source"),
        ("export", "weights", "loop", "loop is a link that leads to itself"),
    ],
)
def test_a_target_in_or_above_the_source_is_one_line(
    model: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    direction: str, source: str, out: str, says: str, overwrite: list[str],
) -> None:  # fmt: skip
    """Its hf/ has a config.json, as an earlier export has, but is a part of it."""
    shutil.copytree(model, tmp_path / "hf")
    for name in ("weights", "other"):
        shutil.copytree(weights, tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "weights" / "hf")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    arguments = ["convert", direction, str(tmp_path / source), str(tmp_path / out), *overwrite]
    assert main([*arguments, "--no-verify"]) == 2
    said = capsys.readouterr().err
    assert re.search(says, said), said
    assert said.count("\n") == 1
    assert set(os.listdir(tmp_path)) == {"hf", "weights", "other", "link", "loop"}
    assert verify(tmp_path / "weights") == verify(tmp_path / "other") == []


def test_a_model_that_the_disk_has_no_room_for(tmp_path: Path) -> None:
    """Its own file has holes in place of data, and so fits."""
    free = shutil.disk_usage(tmp_path).free
    config = CONFIGS["llama_gqa_tied"]
    source = make(tmp_path / "hf", config)
    stored = load_file(source / "model.safetensors")
    tensors = {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()}
    rows = 2 * free // (config.hidden_size * 4)
    tensors["model.embed_tokens.weight"] = (torch.float32, (rows, config.hidden_size))
    with open(source / "model.safetensors", "wb") as handle:
        header = header_bytes(tensors)
        handle.write(header)
        handle.truncate(len(header) + sum(torch.Size(s).numel() * 4 for _, s in tensors.values()))
    settings = json.loads((source / "config.json").read_text()) | {"vocab_size": rows}
    (source / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"/out needs .* GB, its disk has .* GB left"):
        import_hf(source, tmp_path / "out", verify=False)
    assert os.listdir(tmp_path) == ["hf"]


def test_an_export_that_the_disk_has_no_room_for(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    size = sum(p.stat().st_size for p in (weights / "state").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size // 2))
    with pytest.raises(UserError, match=r"/out needs .* GB, its disk has .* GB left"):
        export_hf(weights, tmp_path / "out", verify=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "common.pt"])
def test_a_wrong_byte_anywhere_in_a_state_is_noticed(
    weights: Path, tmp_path: Path, name: str
) -> None:
    """In values, in a tensor's own header, in what nobody reads: without verify too."""
    shutil.copytree(weights, tmp_path / "weights")
    file = tmp_path / "weights" / "state" / name
    data = file.read_bytes()
    for place in (0, len(data) - 1, *(random.randrange(len(data)) for _ in range(15))):
        wrong = bytearray(data)
        wrong[place] ^= 1 << random.randrange(8)
        file.write_bytes(wrong)
        with pytest.raises(UserError, match=rf"{name} (is damaged|does not match its checksum)"):
            export_hf(tmp_path / "weights", tmp_path / "out", verify=False)
        assert os.listdir(tmp_path) == ["weights"], place
    file.write_bytes(data)
    export_hf(tmp_path / "weights", tmp_path / "out", verify=False)
