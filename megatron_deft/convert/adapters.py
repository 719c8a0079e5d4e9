"""Adapter checkpoints: what they hold beside the base they name, and the two merged into one model.

A checkpoint of adapters has no weights but A and B. Its manifest's entry `adapter` says how they
are added and to what: the base's folder, and the checksum of its weights.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert import mapping
from megatron_deft.convert.hf_folder import Weights, locate
from megatron_deft.convert.mapping import Parameter
from megatron_deft.convert.sources import HFSource, StateSource, find_slots
from megatron_deft.convert.state import StateReader
from megatron_deft.convert.streams import Reached, nothing_follows
from megatron_deft.errors import UserError
from megatron_deft.models.adapters import A, Adapters, B
from megatron_deft.models.families import ModelSpec


def of_weight(weight: Parameter, rank: int, spec: ModelSpec) -> tuple[Parameter, Parameter]:
    """A and B of one matrix, as parameters that a checkpoint holds.

    B's rows are those of q, k and v, or of gate and up, in the weight's own order: its `hf` are the
    parts of B by the names of the weight's parts. A has no parts; they share it.
    """
    module = weight.megatron.removesuffix("weight")
    is_row = weight.shard == "columns"
    columns = mapping.megatron_shape(weight, spec)[1]
    parts: dict[str, tuple[int, ...]] = {n: (shape[0], rank) for n, shape in weight.hf.items()}
    place = weight.layer, weight.expert
    a: dict[str, tuple[int, ...]] = {f"{module}{A}": (rank, columns)}
    return (
        Parameter(module + A, "copy", "columns" if is_row else "whole", a, *place),
        Parameter(module + B, weight.transform, "whole" if is_row else weight.shard, parts, *place),
    )


def numbers(spec: ModelSpec, adapters: Adapters | None, mtp_layers: int = 0) -> tuple[int, int]:
    """How many numbers are trained, and how many the model has, adapters not counted.

    mtp_layers: heads of multi-token prediction, which models/heads.py describes
    """
    shapes = {p: mapping.megatron_shape(p, spec) for p in mapping.parameters(spec)}
    last = sum(prod(shape) for p, shape in shapes.items() if p.layer == spec.num_layers - 1)
    head = 2 * spec.hidden_size**2 + 3 * spec.hidden_size + last  # projection, norms, layer
    base = sum(map(prod, shapes.values())) + mtp_layers * head
    if adapters is None:
        return base, base
    adapted = (shape for p, shape in shapes.items() if adapters.has(p.megatron))
    return sum(adapters.rank * sum(shape) for shape in adapted), base


def weight_files(folder: Path) -> list[str]:
    """The files that hold a base's weights."""
    if (folder / folders.MANIFEST).exists():
        return [n for n in folders.read_manifest(folder)["files"] if n.startswith("state/")]
    return sorted({stored.file.name for stored in Weights(folder).tensors.values()})


def fingerprint(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One checksum of those of `weight_files`."""
    return str(xxh3_128(json.dumps(files, sort_keys=True).encode()).hexdigest())


class AdapterState:
    """The tensors of an adapter checkpoint.

    Errors: UserError when its state is not the adapters of its manifest.
    """

    def __init__(self, folder: Path, reached: Reached = nothing_follows) -> None:
        self.path = folder
        self.manifest = folders.read_manifest(folder)
        self.spec = ModelSpec.from_json(self.manifest["spec"])
        self.adapters = Adapters.from_json(self.manifest["adapter"])
        self.pairs = {
            p.megatron: of_weight(p, self.adapters.rank, self.spec)
            for p in mapping.parameters(self.spec)
            if self.adapters.has(p.megatron)
        }
        self._reader = StateReader(folder / "state", reached)
        every = [parameter for pair in self.pairs.values() for parameter in pair]
        self._slots = find_slots(folder, every, self.spec, self._reader.tensors)

    def read(self, parameter: Parameter) -> Tensor:
        """A or B of a matrix, whole, in its stored dtype."""
        tensor = self._reader.read(self._slots[parameter])
        return tensor.reshape(mapping.megatron_shape(parameter, self.spec))


class Merged:
    """A checkpoint of adapters and its base as one model, a Source.

    base: where the base lies now, if not where the manifest says
    Errors: UserError when the base is gone, or is not what the adapters were trained on.
    """

    def __init__(
        self, folder: Path, reached: Reached = nothing_follows, base: str | Path | None = None
    ) -> None:
        self.path = folder
        self._state = AdapterState(folder, reached)
        self.manifest, self.spec = self._state.manifest, self._state.spec
        self._base = _open_base(folder, self.manifest["adapter"]["base"], base)
        if self._base.spec != self.spec:
            raise UserError(
                f"{self._base.path} is another architecture than the adapters {folder} are of: "
                "name the base they were trained on with --base"
            )
        self.parameters = self._base.parameters
        self.has_heads = isinstance(self._base, StateSource) and self._base.has_heads

    def dtypes(self, parameter: Parameter) -> list[torch.dtype]:
        """See Source: the base's."""
        return self._base.dtypes(parameter)

    def read(self, parameter: Parameter, dtype: torch.dtype) -> Tensor:
        """See Source: W + scale * B A, made in fp32 and rounded once."""
        pair = self._state.pairs.get(parameter.megatron)
        if pair is None:
            return self._base.read(parameter, dtype)
        weight = self._base.read(parameter, torch.float32)
        a, b = (self._state.read(part).float() for part in pair)
        # In place: a source reads into memory of its own each time.
        return weight.addmm_(b, a, alpha=self._state.adapters.scale).to(dtype)


def open_ours(
    folder: Path, reached: Reached = nothing_follows, base: str | Path | None = None
) -> StateSource | Merged:
    """A weights or checkpoint folder as one whole model, adapters merged."""
    if folders.read_manifest(folder).get("adapter"):
        return Merged(folder, reached, base)
    if base is not None:
        raise UserError(f"--base={base}: {folder} is a whole model and has no base; leave it out")
    return StateSource(folder, reached)


def _open_base(
    folder: Path, recorded: Mapping[str, str], base: str | Path | None
) -> HFSource | StateSource:
    path = Path(recorded["path"]) if base is None else locate(base)
    if not path.exists():
        raise UserError(
            f"the base of {folder} is gone: {path} does not exist; name where it lies now with "
            "--base FOLDER"
        )
    if not (path / "config.json").is_file():
        path = folders.resolve(path)
    found = fingerprint(folders.hash_files(path, weight_files(path)))
    if found != recorded["weights_xxh3_128"]:
        raise UserError(
            f"{path} has other weights than those that {folder} was trained on: put the base back "
            "as it was, or name where it lies with --base FOLDER"
        )
    is_ours = (path / folders.MANIFEST).exists()
    return StateSource(path) if is_ours else HFSource(path)
