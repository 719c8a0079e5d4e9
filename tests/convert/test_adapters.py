"""Adapter checkpoints exported: merged as float64 says, and alone as peft reads them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_deft import checkpoint_folder as folders
from megatron_deft.cli import main
from megatron_deft.convert.adapters import numbers
from megatron_deft.convert.hf import export_hf, import_hf
from megatron_deft.convert.inspect import describe, inspect
from megatron_deft.convert.nemo import export_nemo
from megatron_deft.convert.ours import single_process
from megatron_deft.convert.peft import CONFIG, export_peft
from megatron_deft.convert.state import load_model
from megatron_deft.errors import UserError
from megatron_deft.models.adapters import adapters_alone, is_adapter
from megatron_deft.models.families import spec_from_hf
from tests.convert.adapters import ADAPTERS, Made, make_adapters
from tests.convert.tiny_models import CONFIGS, assert_same_tensors, logits, make, tensors

DENSE = ("llama_biases_odd_vocab", "gemma2", "phi3_partial", "glm4", "qwen3_tied")
EXPERTS = "qwen3_moe_mixed"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        case: make_adapters(make(root / case / "hf", CONFIGS[case]), root / case)
        for case in (*DENSE, EXPERTS)
    }


@pytest.mark.parametrize("case", [*DENSE, EXPERTS])
def test_the_merged_model_is_that_of_float64(
    made: dict[str, Made], case: str, tmp_path: Path
) -> None:
    out = tensors(export_hf(made[case].checkpoint, tmp_path / "out"))
    want = made[case].merged()
    assert out.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(out[name], tensor.float(), rtol=1e-5, atol=1e-6)
    before = tensors(made[case].base)
    changed = {name for name in out if not torch.equal(out[name], before[name])}
    assert changed == {f"{module}.weight" for module in made[case].pairs}


def test_a_base_in_our_form_gives_the_same(made: dict[str, Made], tmp_path: Path) -> None:
    base = made["glm4"].base
    case = make_adapters(base, tmp_path, weights=import_hf(base, tmp_path / "w", verify=False))
    ours, theirs = (
        tensors(export_hf(checkpoint, tmp_path / name))
        for name, checkpoint in (("ours", case.checkpoint), ("theirs", made["glm4"].checkpoint))
    )
    assert_same_tensors(ours, theirs)


def test_a_bf16_weight_is_rounded_once(tmp_path: Path) -> None:
    base = make(tmp_path / "hf", CONFIGS["llama_gqa_tied"], torch.bfloat16)
    case = make_adapters(base, tmp_path, torch.bfloat16)
    out = tensors(export_hf(case.checkpoint, tmp_path / "out"))
    for name, exact in case.merged().items():
        assert out[name].dtype == torch.bfloat16
        error = (out[name].double() - exact).abs() / exact.abs().clamp(min=1e-30)
        assert float(error.max()) <= 2**-8 * (1 + 1e-4), name


@pytest.mark.parametrize("case", ["llama_biases_odd_vocab", "gemma2", EXPERTS])
def test_the_model_with_adapters_is_the_merged_one(
    made: dict[str, Made], case: str, tmp_path: Path
) -> None:
    """The modules that training runs against transformers with merged weights."""
    out = export_hf(made[case].checkpoint, tmp_path / "out", verify=False)
    weights = import_hf(made[case].base, tmp_path / "weights", verify=False)
    spec = folders.read_manifest(weights)["spec"]
    ids = torch.arange(40).reshape(2, 20) * 7 % 97
    with torch.no_grad(), single_process():
        from megatron.core import dist_checkpointing

        from megatron_deft.models.build import build_model, transformer_config
        from megatron_deft.models.families import ModelSpec

        spec = ModelSpec.from_json(spec)
        model = build_model(spec, transformer_config(spec), adapters=ADAPTERS).eval()
        load_model(model, weights / "state")
        positions = torch.arange(20).expand(2, 20)
        first = model(ids, positions, None)[..., : spec.vocab_size]
        own = adapters_alone(model.sharded_state_dict())
        loaded = dist_checkpointing.load(own, str(made[case].checkpoint / "state"))
        model.load_state_dict(loaded, strict=False)
        found = model(ids, positions, None)[..., : spec.vocab_size]
        whole = build_model(spec, transformer_config(spec)).eval()
        load_model(whole, weights / "state")
        assert torch.equal(first, whole(ids, positions, None)[..., : spec.vocab_size])
    want = logits(out, ids)
    assert not torch.allclose(first, want, rtol=0.1, atol=0.1)
    scale = float(want.abs().max())
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("case", DENSE)
def test_peft_gets_every_module_its_pair(made: dict[str, Made], case: str, tmp_path: Path) -> None:
    out = export_peft(made[case].checkpoint, tmp_path / "out")
    found = load_file(out / "adapter_model.safetensors")
    want = {
        f"base_model.model.{module}.lora_{part}.weight": tensor
        for module, pair in made[case].pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 5.0)
    assert (config["use_rslora"], config["base_model_name_or_path"]) == (True, "owner/base")
    assert config["target_modules"] == sorted({m.rpartition(".")[2] for m in made[case].pairs})
    assert "base_model_relation: adapter" in (out / "README.md").read_text()


def test_peft_finds_a_base_that_is_no_model_of_the_hub(
    made: dict[str, Made],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = made["glm4"].base
    local = make_adapters(base, tmp_path / "local", name="hf")
    config = json.loads((export_peft(local.checkpoint, tmp_path / "a") / CONFIG).read_text())
    monkeypatch.chdir(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    assert_same_tensors(dict(found.state_dict()), tensors(base))
    assert not caplog.text
    weights = import_hf(base, tmp_path / "w", verify=False)
    ours = make_adapters(base, tmp_path / "ours", weights=weights, name="hf")
    export_peft(ours.checkpoint, tmp_path / "b")
    assert f"trained on as {weights}, which peft cannot read: load its" in caplog.text


@pytest.mark.parametrize("case", [*DENSE, EXPERTS])
def test_numbers_are_those_of_the_modules(case: str) -> None:
    spec = spec_from_hf(CONFIGS[case].to_dict())
    with single_process():
        from megatron_deft.models.build import build_model, transformer_config
        from megatron_deft.models.lora import train_adapters_alone

        for adapters, heads in ((None, 0), (None, 2), (ADAPTERS, 0)):
            config = transformer_config(spec, mtp_layers=heads)
            model = build_model(spec, config, vocab_pad_multiple=1, adapters=adapters)
            if adapters is not None:
                train_adapters_alone(model, seed=1)
            named = list(model.named_parameters())
            trained = sum(p.numel() for _, p in named if p.requires_grad)
            whole = sum(p.numel() for name, p in named if not is_adapter(name))
            assert numbers(spec, adapters, heads) == (trained, whole)


def test_the_command_line(
    made: dict[str, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(made["glm4"].checkpoint)
    assert main(["convert", "export", checkpoint, str(tmp_path / "a"), "--format", "peft"]) == 0
    assert "adapters for peft and vLLM, tensors equal to the source's" in capsys.readouterr().out
    assert main(["convert", "verify", checkpoint, str(made["glm4"].base)]) == 1  # unmerged
    assert "tensors differ" in capsys.readouterr().out


def test_inspect_tells_what_it_is(made: dict[str, Made]) -> None:
    case = made["glm4"]
    text = describe(inspect(case.checkpoint, checksums=True))
    assert "training checkpoint of adapters, whole, every checksum right" in text
    assert "rank 3, alpha 5, rslora True, targets linear_qkv, linear_proj" in text
    assert f"of {case.base}" in text


def test_a_base_that_moved_or_changed(made: dict[str, Made], tmp_path: Path) -> None:
    base = shutil.copytree(made["glm4"].base, tmp_path / "base")
    case = make_adapters(base, tmp_path)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"base of .* is gone: .*base does not exist; .*--base"):
        export_hf(case.checkpoint, tmp_path / "out")
    export_hf(case.checkpoint, tmp_path / "out", base=moved)
    with pytest.raises(UserError, match=r"gemma2/hf has other weights than those that .*adapters"):
        export_hf(case.checkpoint, tmp_path / "again", base=made["gemma2"].base)
    file = moved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"moved has other weights than those that .*adapters"):
        export_hf(case.checkpoint, tmp_path / "again", base=moved)


def test_what_cannot_be_done_is_named(made: dict[str, Made], tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", made[EXPERTS].checkpoint
    with pytest.raises(UserError, match=r"local_experts\.0\.linear_fc1\.weight has an adapter"):
        export_peft(checkpoint, out)
    with pytest.raises(UserError, match="holds adapters: merge them first"):
        export_nemo(checkpoint, out)
    weights = import_hf(made["glm4"].base, tmp_path / "weights", verify=False)
    with pytest.raises(UserError, match=r"holds a whole model, no adapters: .*--format peft"):
        export_peft(weights, out)
    with pytest.raises(UserError, match=r"--base=x: .*weights is a whole model and has no base"):
        export_hf(weights, out, base="x")
    assert (
        main(["convert", "export", str(weights), str(out), "--format", "peft", "--base", "x"]) == 2
    )
    assert not out.exists()
