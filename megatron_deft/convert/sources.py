"""A model in a folder, read parameter by parameter in Megatron's form; every tensor accounted for.

A Hugging Face folder and a Megatron state look alike from here, so whoever reads a model (import,
export, verification, training) need not know which it is.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert import hf_folder, mapping
from megatron_deft.convert.hf_folder import Weights, some
from megatron_deft.convert.mapping import Parameter, Slot
from megatron_deft.convert.safetensors_io import Stored
from megatron_deft.convert.state import StateReader
from megatron_deft.convert.streams import Reached, nothing_follows
from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec, spec_from_hf

# Tensors of a training checkpoint that belong to the optimizer and not to the model.
OPTIMIZER_PREFIXES = ("optimizer.", "chained_")
# Heads of multi-token prediction, for which no family here has a place.
HEADS_PREFIX = "mtp."


class Source(Protocol):
    """What is common to both."""

    path: Path
    spec: ModelSpec
    parameters: list[Parameter]

    def dtypes(self, parameter: Parameter) -> list[torch.dtype]:
        """The stored dtype of each of its Hugging Face tensors."""

    def read(self, parameter: Parameter, dtype: torch.dtype) -> Tensor:
        """The whole Megatron tensor, without vocabulary padding, converted to `dtype`."""


class HFSource:
    """A Hugging Face folder.

    Errors: UserError naming the file, tensor or config field at fault, before any tensor is read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config: dict[str, Any] = hf_folder.read_json(folder / "config.json", "model's config")
        self.spec = spec_from_hf(self.config)
        self.weights = Weights(folder)
        self.tied_copy = self._has_tied_copy()
        self.parameters = account(folder, self.spec, self.weights.tensors)

    def _has_tied_copy(self) -> bool:
        """Whether a tied head is stored beside its equal embedding."""
        copy, original = mapping.TIED_COPY
        if not _stores_tied_copy(self.spec, self.weights.tensors):
            return False
        if not torch.equal(self.weights.load(copy), self.weights.load(original)):
            raise UserError(
                f"{self.path}: config.json ties the embeddings but {copy} differs from {original}: "
                "set tie_word_embeddings to false if the model has a head of its own"
            )
        return True

    def dtypes(self, parameter: Parameter) -> list[torch.dtype]:
        """See Source."""
        return [self.weights.tensors[name].dtype for name in parameter.hf]

    def read(self, parameter: Parameter, dtype: torch.dtype) -> Tensor:
        """See Source."""
        tensors = [self.weights.load(name).to(dtype) for name in parameter.hf]
        return mapping.join(parameter, tensors, self.spec)


def account(folder: Path, spec: ModelSpec, stored: Mapping[str, Stored]) -> list[Parameter]:
    """The model's parameters, every tensor of a Hugging Face folder matched to one by its header.

    A copy of the embedding for a tied head is not compared with it. Errors: UserError naming what
    is missing, left over or of another shape.
    """
    parameters = mapping.parameters(spec)
    wanted = {name: shape for p in parameters for name, shape in p.hf.items()}
    found = {name for name in stored if not name.endswith(mapping.IGNORED_SUFFIXES)}
    if _stores_tied_copy(spec, stored):
        found.remove(mapping.TIED_COPY[0])
    _require_none_left(folder, wanted.keys() - found, found - wanted.keys(), spec)
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise UserError(
                f"{folder}: {name} has shape {list(stored[name].shape)}, config.json says "
                f"{list(shape)}: config and weights are of different models"
            )
    return parameters


def _stores_tied_copy(spec: ModelSpec, stored: Mapping[str, Stored]) -> bool:
    return spec.tied_embeddings and set(mapping.TIED_COPY) <= stored.keys()


class StateSource:
    """A weights or checkpoint folder of ours, as `checkpoint_folder.resolve` returns it.

    reached: told how far each file has been read
    Errors: UserError when its state is not the model of its manifest.
    """

    def __init__(self, folder: Path, reached: Reached = nothing_follows) -> None:
        self.path = folder
        self.manifest = folders.read_manifest(folder)
        self.spec = ModelSpec.from_json(self.manifest["spec"])
        self.parameters = mapping.parameters(self.spec)
        self._reader = StateReader(folder / "state", reached)
        self._slots = find_slots(folder, self.parameters, self.spec, self._reader.tensors)

    @property
    def has_heads(self) -> bool:
        """Whether it holds heads of multi-token prediction beside the model."""
        return any(key.startswith(HEADS_PREFIX) for key in self._reader.tensors)

    def dtypes(self, parameter: Parameter) -> list[torch.dtype]:
        """See Source."""
        dtype = self._reader.tensors[self._slots[parameter].key].properties.dtype
        return [dtype] * len(parameter.hf)

    def read(self, parameter: Parameter, dtype: torch.dtype) -> Tensor:
        """See Source."""
        tensor = self._reader.read(self._slots[parameter])
        return tensor.reshape(mapping.megatron_shape(parameter, self.spec)).to(dtype)


def find_slots(
    folder: Path, parameters: Sequence[Parameter], spec: ModelSpec, stored: Mapping[str, Any]
) -> dict[Parameter, Slot]:
    """Where each parameter lies in a state: every tensor `stored` there matched to one.

    Errors: UserError naming what is missing, left over or of another shape.
    """
    slots = {
        p: next((s for s in mapping.slots(p, spec) if s.key in stored), None) for p in parameters
    }
    found = {parameter: slot for parameter, slot in slots.items() if slot is not None}
    missing = [p.megatron for p in parameters if p not in found]
    apart = (*OPTIMIZER_PREFIXES, HEADS_PREFIX)
    unexpected = {key for key in stored if not key.startswith(apart)}
    unexpected -= {slot.key for slot in found.values()}
    _require_none_left(folder / "state", missing, unexpected, spec)
    for parameter, slot in found.items():
        size = tuple(stored[slot.key].size)
        enough = size[0] >= slot.size[0] if parameter.padded else size[0] == slot.size[0]
        if not enough or size[1:] != slot.size[1:]:
            raise UserError(
                f"{folder}: {slot.key} has shape {list(size)}, the model's spec says "
                f"{list(slot.size)}: {folders.MANIFEST} and state are of different models"
            )
    return found


def _require_none_left(
    path: Path, missing: Iterable[str], unexpected: Collection[str], spec: ModelSpec
) -> None:
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        faults = [f"misses {some(missing)}"] * bool(missing)
        faults += [f"has unexpected {some(unexpected)}"] * bool(unexpected)
        raise UserError(
            f"{path} {' and '.join(faults)}: not a {spec.family} model of {spec.num_layers} "
            "layers as its config says"
        )
