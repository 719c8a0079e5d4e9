"""Import and export: bit for bit, every tensor accounted for, whole folders or none."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert import card, hf, hf_folder, mapping
from megatron_deft.convert.hf import export_hf, import_hf
from megatron_deft.data.tiny import CHAT_TEMPLATE, make_tiny_llama
from megatron_deft.errors import UserError
from tests.convert.tiny_models import CONFIGS, assert_same_tensors, logits, make, tensors


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_round_trip(case: str, tmp_path: Path) -> None:
    """Import and export prove themselves by logits; the tensors come back bit for bit."""
    source = make(tmp_path / "hf", CONFIGS[case])
    weights = import_hf(source, tmp_path / "weights")
    assert folders.verify(weights) == []
    manifest = folders.read_manifest(weights)
    assert (manifest["kind"], manifest["step"], manifest["objective"]) == ("weights", 0, None)
    again = export_hf(weights, tmp_path / "again")
    assert_same_tensors(tensors(again), tensors(source))
    ids = torch.arange(90).reshape(2, 45)
    assert torch.equal(logits(again, ids), logits(source, ids))


def test_shards_and_bf16(tmp_path: Path) -> None:
    """Several source files with an index, several state files, several files out; bf16 is kept."""
    config = CONFIGS["qwen2_biases"]
    source = make(tmp_path / "hf", config, torch.bfloat16, max_shard_size="20KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    weights = import_hf(source, tmp_path / "weights", verify=False)
    again = export_hf(weights, tmp_path / "again", shard_bytes=30_000)
    files = sorted(again.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 2
    assert all(f.stat().st_size < 34_000 for f in files)
    assert_same_tensors(tensors(again), tensors(source))
    index = json.loads((again / hf_folder.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(source).values())
    for name, file in index["weight_map"].items():
        assert name in load_file(again / file)
    assert AutoModelForCausalLM.from_pretrained(again, dtype="auto").dtype == torch.bfloat16


def test_dtype_is_converted_both_ways(tied: Path, tmp_path: Path) -> None:
    bf16 = import_hf(tied, tmp_path / "bf16", dtype="bf16")
    reference = {name: t.bfloat16() for name, t in tensors(tied).items()}
    kept = export_hf(bf16, tmp_path / "kept")
    assert_same_tensors(tensors(kept), reference)
    config = json.loads((kept / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    fp32 = export_hf(bf16, tmp_path / "fp32", dtype="fp32")
    assert_same_tensors(tensors(fp32), {name: t.float() for name, t in reference.items()})
    with pytest.raises(UserError, match="dtype 'fp8' is not one of fp32, bf16"):
        import_hf(tied, tmp_path / "other", dtype="fp8")


def test_rotary_parameters_are_spelled_for_transformers_4_and_5(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", CONFIGS["llama_biases_odd_vocab"])
    weights = import_hf(source, tmp_path / "weights", verify=False)
    again = export_hf(weights, tmp_path / "again", verify=False)
    config = json.loads((again / "config.json").read_text())
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] == scaling
    assert config["rope_parameters"] == {**scaling, "rope_theta": 5000.0}
    # An exported folder is a source again.
    assert import_hf(again, tmp_path / "weights2").is_dir()


def test_tokenizer_template_and_model_card(tmp_path: Path) -> None:
    source = make_tiny_llama(tmp_path / "hf", ["a cat sat on a mat"], layers=1, hidden_size=16)
    (source / "LICENSE").write_text("free")
    (source / "optimizer.pt").write_text("not wanted")
    edit_json(source / "config.json", _name_or_path="owner/HF")
    # As transformers 5 saves it.
    edit_json(source / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    weights = import_hf(source, tmp_path / "weights")
    respelled = "tokenizer_config.json"
    for path in (weights / "hf").iterdir():
        same = path.read_bytes() == (source / path.name).read_bytes()
        assert same is (path.name != respelled), path.name
    again = export_hf(weights, tmp_path / "again")
    assert names(again) == names(source) - {"optimizer.pt"} | {"README.md", folders.SOURCE}
    for folder in (weights / "hf", again):
        config = json.loads((folder / respelled).read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    ours = AutoTokenizer.from_pretrained(again)
    text = "a mat <|im_start|> naïve 12"
    reference = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert ours(text)["input_ids"] == reference.encode(text).ids
    assert ours.chat_template == CHAT_TEMPLATE
    assert "base_model: owner/HF\n" in (again / "README.md").read_text()


def test_a_tokenizer_that_this_transformers_reads_its_own_way_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers 5 splits every Qwen 2 model's texts as Qwen's do, 4 as tokenizer.json says."""
    parts = make_tiny_llama(tmp_path / "parts", ["3 + 39 = 42"] * 9, layers=1, hidden_size=16)
    for case in ("llama_mha_untied", "qwen2_biases"):
        config = deepcopy(CONFIGS[case])
        config.vocab_size = 512
        source = make(tmp_path / case, config)
        for path in parts.glob("tokenizer*"):
            shutil.copyfile(path, source / path.name)
        export_hf(import_hf(source, tmp_path / f"{case}_weights"), tmp_path / f"{case}_again")
    warned = [r.message for r in caplog.records if "makes other ids than the file" in r.message]
    assert len(warned) == transformers.__version__.startswith("5.")
    assert all("qwen2_biases_again" in message for message in warned)


def test_tied_head_stored_twice(tied: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(tied, source)
    head, embedding = mapping.TIED_COPY
    edit(source, lambda t: t.update({head: t[embedding].clone()}))
    again = export_hf(import_hf(source, tmp_path / "weights"), tmp_path / "again")
    assert_same_tensors(tensors(again), tensors(source))
    edit(source, lambda t: t.update({head: t[head] + 1}))
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        import_hf(source, tmp_path / "weights2")


def test_rotary_buffers_are_the_only_tensors_left_behind(tied: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(tied, source)
    edit(
        source, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    again = export_hf(import_hf(source, tmp_path / "weights", verify=False), tmp_path / "again")
    assert_same_tensors(tensors(again), tensors(tied))


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda t: t.__delitem__(name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("model.norm.weight"), r"misses model\.norm\.weight: not a llama model of 4 layers"),
        (
            lambda t: t.update({"model.layers.4.mlp.up_proj.weight": torch.ones(1)}),
            r"has unexpected model\.layers\.4\.mlp\.up_proj\.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(33)}),
            r"model\.norm\.weight has shape \[33\], config\.json says \[32\]",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(48, 32).half()}),
            r"model\.layers\.1\.mlp\.up_proj\.weight are stored as .*float16.* with --dtype",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.int8)}),
            r"model\.norm\.weight is stored as I8, legal are F64, F32, F16, BF16",
        ),
    ],
)
def test_a_tensor_that_does_not_belong_is_named(
    tied: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], says: str
) -> None:
    shutil.copytree(tied, tmp_path / "hf")
    edit(tmp_path / "hf", change)
    with pytest.raises(UserError, match=says):
        import_hf(tmp_path / "hf", tmp_path / "weights")
    assert names(tmp_path) == {"hf"}


def test_files_missing_or_damaged_are_named(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", CONFIGS["llama_mha_untied"], max_shard_size="30KB")
    shard = sorted(source.glob("model-00002-of-*.safetensors"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    with pytest.raises(UserError, match=rf"{shard.name} is damaged"):
        import_hf(source, tmp_path / "weights")
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name} is missing"):
        import_hf(source, tmp_path / "weights")
    shard.write_bytes(data)
    index = json.loads((source / hf_folder.INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (source / hf_folder.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"disagree about model\.norm\.weight"):
        import_hf(source, tmp_path / "weights")
    (source / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json is missing"):
        import_hf(source, tmp_path / "weights")
    with pytest.raises(
        UserError,
        match=r"neither a folder nor a model in the local cache: .*hf download owner/model",
    ):
        import_hf("owner/model", tmp_path / "weights")
    assert names(tmp_path) == {"hf"}


def test_a_damaged_checkpoint_is_named_at_export(tied_weights: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(tied_weights, weights)
    file = next((weights / "state").glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"state/{file.name} does not match its checksum"):
        export_hf(weights, tmp_path / "out")
    file.write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"state/{file.name} has \d+ bytes instead of"):
        export_hf(weights, tmp_path / "out", verify=False)
    file.unlink()
    with pytest.raises(UserError, match=rf"state/{file.name} is missing"):
        export_hf(weights, tmp_path / "out", verify=False)
    assert names(tmp_path) == {"weights"}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_layers", 5, r"has shape \[4, 32\], the model's spec says \[5, 32\]"),
        ("vocab_size", 261, r"has shape \[260, 32\], the model's spec says \[261, 32\]"),
        ("qkv_bias", True, r"misses decoder\.layers\.0\.self_attention\.linear_qkv\.bias"),
        ("tied_embeddings", False, r"misses output_layer\.weight"),
        ("family", "mamba2", r"model family 'mamba2' has no conversion table: legal are gemma2, "),
    ],
)
def test_a_state_of_another_model_is_refused(
    tied_weights: Path, tmp_path: Path, field: str, value: Any, says: str
) -> None:
    shutil.copytree(tied_weights, tmp_path / "weights")
    manifest = folders.read_manifest(tied_weights)
    manifest["spec"][field] = value
    (tmp_path / "weights" / folders.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=says):
        export_hf(tmp_path / "weights", tmp_path / "out")


def test_a_parameter_the_table_does_not_know_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", CONFIGS["qwen2_biases"])
    weights = import_hf(source, tmp_path / "weights", verify=False)
    manifest = folders.read_manifest(weights)
    manifest["spec"]["qkv_bias"] = False
    (weights / folders.MANIFEST).write_text(json.dumps(manifest))
    says = r"has unexpected decoder\.layers\.self_attention\.linear_qkv\.bias"
    with pytest.raises(UserError, match=says):
        export_hf(weights, tmp_path / "out")


def test_a_wrong_transform_is_caught_before_the_folder_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain q|k|v instead of query groups: exact inverses, so only the logits can tell."""
    source = make(tmp_path / "hf", CONFIGS["llama_gqa_tied"])
    sizes = [32, 16, 16]
    plain = mapping.Transform(
        lambda tensors, spec: torch.cat(tuple(tensors)), lambda tensor, spec: tensor.split(sizes)
    )
    monkeypatch.setitem(mapping.TRANSFORMS, "qkv", plain)
    with pytest.raises(UserError, match=r"is not the same: logits differ by .* first at layer 0"):
        import_hf(source, tmp_path / "weights")
    assert names(tmp_path) == {"hf"}
    import_hf(source, tmp_path / "weights", verify=False)
    again = export_hf(tmp_path / "weights", tmp_path / "again", verify=False)
    assert_same_tensors(tensors(again), tensors(source))
    with pytest.raises(UserError, match="is not the same"):
        export_hf(tmp_path / "weights", tmp_path / "checked")
    assert "checked" not in names(tmp_path)


@pytest.mark.parametrize(("module", "moment"), [(hf_folder, "write_weights"), (card, "model_card")])
def test_interrupted_export_leaves_nothing(
    tied_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    moment: str,
) -> None:
    real = getattr(module, moment)

    def interrupted(*args: Any) -> None:
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_hf(tied_weights, tmp_path / "out")
    assert names(tmp_path) == set()


def test_interrupted_import_leaves_the_old_folder(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = import_hf(tied, tmp_path / "weights", verify=False)

    def interrupted(*args: Any, **fields: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf.folders, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_hf(tied, weights, overwrite=True)
    assert names(tmp_path) == {"weights"}
    assert folders.verify(weights) == []


def test_only_what_we_wrote_is_overwritten(tied: Path, tied_weights: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="exists already"):
        import_hf(tied, precious)
    with pytest.raises(UserError, match=r"has no megatron_deft\.json, so it is not overwritten"):
        import_hf(tied, precious, overwrite=True)
    with pytest.raises(UserError, match=r"has no config\.json, so it is not overwritten"):
        export_hf(tied_weights, precious, overwrite=True)
    for out in (tied, tied.parent):
        with pytest.raises(UserError, match="holds the source"):
            import_hf(tied, out, overwrite=True)
    assert names(precious) == {"thesis.tex"}
    out = export_hf(tied_weights, tmp_path / "out", verify=False)
    (out / "stale").write_text("")
    export_hf(tied_weights, out, overwrite=True, verify=False)
    assert "stale" not in names(out)
