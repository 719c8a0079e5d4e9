"""An adapter checkpoint as a folder that peft and vLLM load on top of the base.

    adapter_config.json         rank, alpha, target modules, the base's name
    adapter_model.safetensors   base_model.model.NAME.lora_A.weight, ...lora_B.weight

q, k and v, or gate and up, have one A here: each gets a copy of it, and its own rows of B. The base
is named by its Hub name, or as the folder it was, which peft would otherwise seek where it runs.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert import card, mapping
from megatron_deft.convert.adapters import AdapterState
from megatron_deft.convert.hf import check_target, named_dtype, require_whole
from megatron_deft.convert.hf_folder import is_hub_name, write_json
from megatron_deft.convert.mapping import Parameter
from megatron_deft.convert.safetensors_io import read_header
from megatron_deft.errors import UserError
from megatron_deft.files import atomic_folder
from megatron_deft.hf_files import TOKENIZER_FILES, copy_matching

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
logger = logging.getLogger(__name__)


def export_peft(
    folder: str | Path,
    out: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Write the adapters of a checkpoint or run as the PEFT folder `out`; returns `out`.

    Args:
        folder: what `checkpoint_folder.resolve` accepts, saved at any parallel layout.
        out: written whole or not at all.
        dtype: "fp32" or "bf16" to convert to; None keeps what is stored.
        overwrite: replace an earlier PEFT folder at `out`.
        verify: read it again and compare with the checkpoint bit for bit before `out` appears.

    The base is not read. Errors: UserError when the checkpoint has no adapters or is damaged, and
    for adapters of experts, which are no modules of their own in transformers 5.
    """
    folder, out = folders.resolve(folder), Path(out)
    check_target(out, folder, overwrite, CONFIG)
    target_dtype = named_dtype(dtype)
    manifest = folders.read_manifest(folder)
    if not manifest.get("adapter"):
        raise UserError(f"{folder} holds a whole model, no adapters: leave out --format peft")
    require_whole(folder)
    state = AdapterState(folder)
    if expert := next((name for name, (a, _) in state.pairs.items() if a.expert is not None), None):
        raise UserError(
            f"{folder}: {expert} has an adapter, and peft knows no modules of single experts: "
            "leave out --format peft, and the adapters are merged"
        )
    tensors = {
        name: tensor
        for pair in state.pairs.values()
        for name, tensor in _tensors(state, pair, target_dtype).items()
    }
    needs = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_folder(out, overwrite, needs, CONFIG) as target:
        save_file(tensors, target / WEIGHTS, {"format": "pt"})
        write_json(target / CONFIG, _config(state))
        copy_matching(folder / "hf", target, TOKENIZER_FILES)
        folders.write_source(target, manifest)
        (target / "README.md").write_text(card.model_card(manifest, "peft"), encoding="utf-8")
        if verify:
            _require_same(state, target / WEIGHTS, target_dtype)
    return out


def _modules(b: Parameter) -> list[str]:
    """The Hugging Face modules that a pair is for, in the order of B's parts."""
    return [name.removesuffix(".weight") for name in b.hf]


def _name(module: str, part: str) -> str:
    return f"base_model.model.{module}.lora_{part}.weight"


def _tensors(
    state: AdapterState, pair: tuple[Parameter, Parameter], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    a, b = (state.read(part) for part in pair)
    rows = mapping.split(pair[1], b.to(dtype or b.dtype), state.spec).values()
    found = {}
    for module, of_b in zip(_modules(pair[1]), rows, strict=True):
        found[_name(module, "A")] = a.to(dtype or a.dtype, copy=True)  # a file shares no memory
        found[_name(module, "B")] = of_b.clone()
    return found


def _config(state: AdapterState) -> dict[str, Any]:
    adapters, manifest = state.adapters, state.manifest
    modules = (module for _, b in state.pairs.values() for module in _modules(b))
    return {
        "base_model_name_or_path": _base(manifest),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapters.rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "task_type": "CAUSAL_LM",
        "use_rslora": adapters.rslora,
    }


def _base(manifest: Mapping[str, Any]) -> str:
    """What peft loads by itself, as AutoPeftModelForCausalLM does."""
    name, path = manifest.get("base"), str(manifest["adapter"]["base"]["path"])
    if name and is_hub_name(name):
        return str(name)
    if (Path(path) / folders.MANIFEST).exists():
        logger.warning(
            "the base %s was trained on as %s, which peft cannot read: load its Hugging Face "
            "folder yourself, PeftModel.from_pretrained(BASE, ADAPTERS)",
            name,
            path,
        )
    return path


def _require_same(state: AdapterState, file: Path, dtype: torch.dtype | None) -> None:
    """Put what was written together again, and compare every adapter bit for bit."""
    stored = read_header(file)
    for pair in state.pairs.values():
        a, b = (state.read(part) for part in pair)
        copies, rows = (
            [stored[_name(module, part)].load() for module in _modules(pair[1])] for part in "AB"
        )
        same = all(torch.equal(copy, a.to(copy.dtype)) for copy in copies)
        joined = mapping.join(pair[1], rows, state.spec)
        if not same or not torch.equal(joined, b.to(dtype or b.dtype)):
            raise UserError(
                f"{pair[0].megatron} was not written as {state.path} holds it; nothing was kept: "
                "please report it with the model's config.json"
            )
