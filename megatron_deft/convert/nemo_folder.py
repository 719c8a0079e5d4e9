"""A NeMo 2 checkpoint folder, read without NeMo.

    FOLDER/context/model.yaml   the model: class, config with every default, tokenizer
    FOLDER/context/io.json      the same as a Fiddle graph, without defaults, and the trainer
    FOLDER/context/DIR          files of the tokenizer
    FOLDER/weights/             torch_dist, the keys of megatron's own GPTModel behind `module.`

NeMo itself is not needed, nor wanted: it takes twenty seconds to import, pins half of the packages
around it, and builds its configs only where TransformerEngine is. model.yaml is read and not
io.json, which names only what was given and leaves the rest to the defaults of NeMo's classes.
Source: nemo/lightning/io/{mixin,pl}.py and nemo/lightning/ckpt_utils.py of NeMo 2.7.3.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from megatron_deft.convert import mapping
from megatron_deft.convert.hf_folder import some
from megatron_deft.convert.mapping import Parameter, Slot
from megatron_deft.convert.nemo_models import hf_config
from megatron_deft.convert.safetensors_io import STORED_DTYPES
from megatron_deft.convert.sources import HEADS_PREFIX, OPTIMIZER_PREFIXES
from megatron_deft.convert.state import StateReader
from megatron_deft.convert.streams import Reached, nothing_follows
from megatron_deft.errors import UserError
from megatron_deft.models.families import FAMILIES, ModelSpec, spec_from_hf

SCHEME = "nemo://"
MODEL = "model.yaml"
ADAPTER_FILE = "adapter_metadata.json"
WORDS = "embedding.word_embeddings.weight"
FUSED_NORM = mapping.CHECKPOINT_NAMES[mapping.PRE_MLP_NORM]
NORMS = {".post_norm.": ".post_layernorm."}  # our name -> NeMo's (its Gemma 2)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def models_cache() -> Path:
    """Where nemo://NAME is looked for, as NeMo does (nemo/lightning/base.py)."""
    home = Path(os.environ.get("NEMO_HOME") or Path.home() / ".cache" / "nemo")
    return Path(os.environ.get("NEMO_MODELS_CACHE") or home / "models")


def is_nemo(source: str | Path) -> bool:
    """Whether `source` is meant for this module, and not for the Hugging Face reader."""
    path = Path(source)
    if str(source).startswith(SCHEME) or path.suffix == ".nemo":
        return True
    marks = ("context", "weights", "model_config.yaml", MODEL)
    return not (path / "config.json").exists() and any((path / mark).exists() for mark in marks)


def find(source: str | Path) -> Path:
    """The folder that `source` means: a path, or nemo://NAME.

    Errors: UserError when there is none, or when it is a checkpoint of NeMo 1.
    """
    name = str(source).removeprefix(SCHEME)
    path = models_cache() / name if str(source).startswith(SCHEME) else Path(source)
    if (path.suffix == ".nemo" and path.is_file()) or (path / "model_config.yaml").is_file():
        raise UserError(
            f"{path} is a NeMo 1 checkpoint: convert it to NeMo 2 first, with "
            "scripts/checkpoint_converters/convert_nemo1_to_nemo2.py of the NeMo repository"
        )
    if path.is_dir():
        return path
    if path == Path(source):
        raise UserError(f"{path} is not a folder: name a NeMo 2 checkpoint or nemo://NAME")
    root = models_cache()
    there = sorted(
        p.parent.relative_to(root).as_posix()
        for depth in ("*", "*/*", "*/*/*")
        for p in root.glob(f"{depth}/weights")
    )
    raise UserError(
        f"{source} is not in {root} ({'there are ' + some(there) if there else 'nothing is'}): "
        "set NEMO_MODELS_CACHE or NEMO_HOME, or name the folder itself"
    )


def _read_model(context: Path) -> dict[str, Any]:
    """context/model.yaml."""
    path = context / MODEL
    try:
        model = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: name the folder of a NeMo 2 checkpoint, with context/ and "
            "weights/; one without it can be loaded and saved again by NeMo 2.7"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML ({error}): copy it again") from None
    if not isinstance(model, dict) or not isinstance(model.get("config"), dict):
        raise UserError(f"{path} holds no model with a config: copy it again")
    return model


def _plain(value: Any) -> Any:
    """A function or a dtype by its name; everything else as it is."""
    return value["_target_"] if isinstance(value, dict) and "_target_" in value else value


class Nemo:
    """A NeMo 2 checkpoint: its config.json, its tokenizer, its parameters.

    Has the attributes path, spec, parameters, dtypes() and read() of every model that is read
    parameter by parameter. Errors: UserError before any tensor is read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        context, weights = (_inside(folder, name) for name in ("context", "weights"))
        model = _read_model(context)
        self._refuse_adapters(model, weights)
        config = {key: _plain(value) for key, value in model["config"].items()}
        name = str(model.get("_target_")).rpartition(".")[2]
        self.tokenizer = _tokenizer_files(context, model.get("tokenizer"))
        facts = _tokenizer_facts(self.tokenizer)
        self.config = hf_config(name, config, facts.pop("tokens", None)) | facts
        if self.config["vocab_size"] is None:
            raise UserError(
                f"{context}: neither {MODEL} nor a tokenizer tells the size of the vocabulary: "
                f"set config.vocab_size in {MODEL}"
            )
        self.spec = spec_from_hf(self.config)
        self.config["architectures"] = [FAMILIES[self.spec.family].architecture]
        if not weights.is_dir() or not (weights / ".metadata").exists():
            raise UserError(
                f"{weights} holds no .metadata, so the weights are missing: copy the whole "
                "checkpoint; zarr weights must be saved again by NeMo as torch_dist"
            )
        self.state = State(weights, self.spec, renamed=NORMS)
        self.parameters = self.state.parameters
        self.dtypes, self.read = self.state.dtypes, self.state.read

    def _refuse_adapters(self, model: Mapping[str, Any], weights: Path) -> None:
        transform = _plain(model.get("model_transform"))
        if transform is not None or (weights / ADAPTER_FILE).exists():
            raise UserError(
                f"{self.path} is an adapter checkpoint ({transform or ADAPTER_FILE}): merge it "
                "into its base with NeMo's llm.peft.merge_lora and name the merged folder"
            )


def _inside(folder: Path, name: str) -> Path:
    """Checkpoints of the first NeMo 2 releases have no subfolders."""
    return folder / name if (folder / name).is_dir() else folder


def _tokenizer_files(context: Path, tokenizer: Any) -> list[Path]:
    """The files of the tokenizer; none when NeMo kept no more than a name."""
    named = [v for v in (tokenizer or {}).values() if isinstance(v, str) and v not in ("", ".")]
    paths = [context / value for value in named if not Path(value).is_absolute()]
    folders = [p for p in paths if p.is_dir()]
    files = [p for p in paths if p.is_file()]
    return files + [p for folder in folders for p in sorted(folder.iterdir()) if p.is_file()]


def _tokenizer_facts(files: Iterable[Path]) -> dict[str, Any]:
    """tokens, bos_token_id and eos_token_id of a Hugging Face tokenizer; empty without one."""
    found = next((p for p in files if p.name in TOKENIZER_FILES), None)
    if found is None:
        return {}
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            found.parent, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{found.parent} is no tokenizer that transformers reads ({error}): copy it again"
        ) from None
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id")}
    return {"tokens": len(tokenizer), **ids}


class State:
    """The parameters of a model in a torch_dist folder, whatever stands before its keys.

    renamed: parts of our names -> how the folder spells them
    Errors: UserError when the tensors are not those of the model.
    """

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        renamed: Mapping[str, str] | None = None,
        reached: Reached = nothing_follows,
    ) -> None:
        self.path, self.spec = folder, spec
        self.parameters = mapping.parameters(spec)
        self._reader = StateReader(folder, reached)
        self._renamed = renamed or {}
        model = {k: t for k, t in self._reader.tensors.items() if not _of_optimizer(k)}
        if adapters := sorted(key for key in model if ".adapter." in key):
            raise UserError(
                f"{folder} holds the adapter {some(adapters, 1)}: merge it into its base with "
                "NeMo's llm.peft.merge_lora and name the merged folder"
            )
        if any(key.startswith(HEADS_PREFIX) for key in model):
            raise UserError(
                f"{folder} holds heads of multi-token prediction, which are not converted from or "
                "to NeMo: export to Hugging Face, which leaves them out"
            )
        prefixes = [key.removesuffix(WORDS) for key in model if key.endswith(WORDS)]
        self._prefix = prefixes[0] if len(prefixes) == 1 else ""
        self._slots = self._account(model)

    def _key(self, slot: Slot) -> str:
        key = slot.key
        for ours, theirs in self._renamed.items():
            key = key.replace(ours, theirs)
        return self._prefix + key

    def _account(self, stored: Mapping[str, Any]) -> dict[Parameter, Slot]:
        """Match every tensor to a parameter, or fail by name."""
        found: dict[Parameter, Slot] = {}
        for parameter in self.parameters:
            for slot in mapping.slots(parameter, self.spec):
                key = self._key(slot)
                # Without TransformerEngine NeMo's experts have the name that a fused norm has.
                for name in (key, key.replace(mapping.PRE_MLP_NORM, FUSED_NORM)):
                    if parameter not in found and name in stored:
                        found[parameter] = slot._replace(key=name)
        missing = [p.megatron for p in self.parameters if p not in found]
        unexpected = sorted(stored.keys() - {slot.key for slot in found.values()})
        if missing or unexpected:
            faults = [f"misses {some(missing)}"] * bool(missing)
            faults += [f"has unexpected {some(unexpected)}"] * bool(unexpected)
            raise UserError(
                f"{self.path} {' and '.join(faults)}: not a {self.spec.family} model of "
                f"{self.spec.num_layers} layers as its config says; nothing was written"
            )
        for parameter, slot in found.items():
            self._check(parameter, slot, stored[slot.key])
        return found

    def _check(self, parameter: Parameter, slot: Slot, stored: Any) -> None:
        size, dtype = tuple(stored.size), stored.properties.dtype
        enough = size[0] >= slot.size[0] if parameter.padded else size[0] == slot.size[0]
        if not enough or size[1:] != slot.size[1:]:
            raise UserError(
                f"{self.path}: {slot.key} has shape {list(size)}, the config says "
                f"{list(slot.size)}: config and weights are of different models"
            )
        if dtype not in STORED_DTYPES.values():
            raise UserError(
                f"{self.path}: {slot.key} is stored as {dtype}: start from unquantised weights"
            )

    def dtypes(self, parameter: Parameter) -> list[torch.dtype]:
        """The stored dtype of each of its Hugging Face tensors."""
        dtype = self._reader.tensors[self._slots[parameter].key].properties.dtype
        return [dtype] * len(parameter.hf)

    def read(self, parameter: Parameter, dtype: torch.dtype) -> Tensor:
        """The whole Megatron tensor, without vocabulary padding, converted to `dtype`."""
        tensor = self._reader.read(self._slots[parameter])
        return tensor.reshape(mapping.megatron_shape(parameter, self.spec)).to(dtype)


def _of_optimizer(key: str) -> bool:
    return key.startswith(OPTIMIZER_PREFIXES)
