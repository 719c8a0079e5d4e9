"""Import a Hugging Face folder into Megatron state and export Megatron state to one.

One process, no GPU, no TransformerEngine; tensors stream, so memory holds one parameter in both
forms whatever the model's size. Each direction accounts for every tensor by name and shape, proves
by logits that both models are the same (convert/verify.py), and then gives the folder its name.
"""

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert import card, hf_folder, mapping, portable, tokenizer
from megatron_deft.convert import verify as proof
from megatron_deft.convert.hf_folder import Piece, Weights, some
from megatron_deft.convert.mapping import Parameter, Slot
from megatron_deft.convert.state import DATA_SUFFIX, Chunk, StateReader, write_state
from megatron_deft.convert.streams import nothing_follows, progress_bar
from megatron_deft.errors import UserError
from megatron_deft.files import atomic_folder
from megatron_deft.models.families import ModelSpec, spec_from_hf

HEADER_BYTES = 4096  # at most, of one tensor, in either format
logger = logging.getLogger(__name__)

# Tensors of a training checkpoint that belong to the optimizer and not to the model.
OPTIMIZER_PREFIXES = ("optimizer.", "chained_")


def import_hf(
    hf_dir: str | Path,
    out: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Convert the Hugging Face folder `hf_dir` into the weights folder `out`; returns `out`.

    Args:
        hf_dir: config.json, safetensors (one file, or shards with an index), tokenizer files.
        out: written whole or not at all; layout in megatron_deft/checkpoint_folder.py.
        dtype: "fp32" or "bf16" to convert to; None keeps what is stored.
        overwrite: replace an earlier weights folder at `out`.
        verify: compare logits with transformers before `out` appears; holds the model in fp32.

    The state holds the vocabulary without padding: megatron zero-fills the padding of whatever
    layout loads it. Errors: UserError naming the file, tensor or config field at fault.
    """
    source, out = Path(hf_dir), Path(out)
    if not source.is_dir():
        raise UserError(
            f"{source} is not a folder: download the model first (hf download NAME --local-dir DIR)"
        )
    _check_target(out, source, overwrite, folders.MANIFEST)
    target_dtype = _dtype(dtype)
    config = hf_folder.read_json(source / "config.json", "model's config")
    spec = spec_from_hf(config)
    tokenizer.check_vocabulary(source, spec.vocab_size)
    weights = Weights(source)
    parameters = mapping.parameters(spec)
    tied_copy = _account_hf(source, weights, parameters, spec)
    chunks = _chunks(source, weights, parameters, spec, target_dtype)
    logger.info("importing %d tensors of %s", len(weights.tensors), source)
    total = sum(chunk.bytes for chunk in chunks)
    with (
        atomic_folder(out, overwrite, _needs(total, len(chunks), source)) as folder,
        folders.FollowingHashes(folder) as hashes,
        progress_bar("import", total) as bar,
    ):
        hf_folder.copy_companions(source, folder / "hf")
        portable.rewrite_tokenizer_config(folder / "hf")  # what trains may be another transformers
        write_state(folder / "state", chunks, bar, hashes.reached)
        folders.write_manifest(
            folder,
            files=hashes.finish(folders.list_files(folder)),
            kind="weights",
            spec=spec.to_json(),
            base=hf_folder.base_name(source, config),
            license=card.read_license(source),
            dtype=dtype,
            tied_copy=tied_copy,
        )
        if verify:
            proof.require_equal(source, folder, dtype)
    return out


def export_hf(
    folder: str | Path,
    out: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    shard_bytes: int = hf_folder.SHARD_BYTES,
) -> Path:
    """Convert a weights, checkpoint or run folder into the Hugging Face folder `out`; returns it.

    Args:
        folder: what `checkpoint_folder.resolve` accepts, saved at any parallel layout.
        out: written whole or not at all: safetensors, config.json, tokenizer, README.md.
        dtype: "fp32" or "bf16" to convert to; None keeps what is stored.
        overwrite: replace an earlier Hugging Face folder at `out`.
        verify: compare logits with transformers before `out` appears; holds the model in fp32.
        shard_bytes: largest safetensors file, bytes.

    Every file of the source is compared with its checksum before `out` appears. Without `verify`
    a training checkpoint's tensor files are compared by size only: they hold far more than weights.

    Errors: UserError naming the file, tensor or setting at fault.
    """
    source, out = folders.resolve(folder), Path(out)
    _check_target(out, source, overwrite, "config.json")
    target_dtype = _dtype(dtype)
    manifest = folders.read_manifest(source)
    spec = ModelSpec.from_json(manifest["spec"])
    large = {name for name in manifest["files"] if name.endswith(DATA_SUFFIX)}
    _require_whole(source, checksums=manifest["files"].keys() - large)
    hashes = folders.FollowingHashes(source)
    follow = verify or manifest["kind"] == "weights"
    reader = StateReader(source / "state", hashes.reached if follow else nothing_follows)
    pieces = _pieces(source, reader, spec, target_dtype)
    if manifest.get("tied_copy"):
        pieces.append(_tied_copy(pieces))
    config = hf_folder.read_json(source / "hf" / "config.json", "model's config")
    dtypes = {piece.dtype for piece in pieces}
    logger.info("exporting %s to %s", source, out)
    total = sum(piece.bytes for piece in pieces)
    with (
        atomic_folder(out, overwrite, _needs(total, len(pieces), source / "hf")) as target,
        hashes,
        progress_bar("export", total) as bar,
    ):
        hf_folder.copy_companions(source / "hf", target)
        hf_folder.write_weights(target, pieces, shard_bytes, bar)
        if follow:
            _require_whole(source, checksums=large, known=hashes.finish(large))
        uniform = dtypes.pop() if len(dtypes) == 1 else None
        hf_folder.write_json(
            target / "config.json", portable.portable_config(config, spec, uniform)
        )
        portable.rewrite_tokenizer_config(target)
        (target / "README.md").write_text(card.model_card(manifest), encoding="utf-8")
        if verify:
            proof.require_equal(target, source, dtype)
            if warning := tokenizer.disagreement(target):
                logger.warning("%s", warning)
    return out


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in proof.DTYPES:
        legal = ", ".join(proof.DTYPES)
        raise UserError(
            f"dtype {name!r} is not one of {legal}: leave it out to keep what is stored"
        )
    return proof.DTYPES[name] if name else None


def _needs(weights: int, tensors: int, companions: Path) -> int:
    """Bytes to be written: the weights, each tensor's header, and the files copied beside them."""
    copied = sum(path.stat().st_size for path in hf_folder.companions(companions))
    return weights + tensors * HEADER_BYTES + copied


def _require_whole(source: Path, **how: Any) -> None:
    if problems := folders.verify(source, **how):
        raise UserError(f"{source} is damaged: {'; '.join(problems)}: use another checkpoint")


def _check_target(out: Path, source: Path, overwrite: bool, marker: str) -> None:
    """Refuse to write over the source, or over a folder that is not of the kind to be written."""
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{out} holds the source {source}: name another output folder")
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists already: name another folder or pass --overwrite")
    if not out.is_dir() or (any(out.iterdir()) and not (out / marker).exists()):
        raise UserError(f"{out} has no {marker}, so it is not overwritten: remove it yourself")


def _account_hf(
    source: Path, weights: Weights, parameters: Iterable[Parameter], spec: ModelSpec
) -> bool:
    """Match every tensor to a parameter, or fail by name; return whether a tied head is stored."""
    wanted = {name: shape for p in parameters for name, shape in p.hf.items()}
    found = {n for n in weights.tensors if not n.endswith(mapping.IGNORED_SUFFIXES)}
    copy, original = mapping.TIED_COPY
    tied_copy = spec.tied_embeddings and copy in found and original in found
    if tied_copy:
        if not torch.equal(weights.load(copy), weights.load(original)):
            raise UserError(
                f"{source}: config.json ties the embeddings but {copy} differs from {original}: "
                "set tie_word_embeddings to false if the model has a head of its own"
            )
        found.remove(copy)
    _none_left(source, sorted(wanted.keys() - found), sorted(found - wanted.keys()), spec)
    for name, shape in wanted.items():
        if (stored := weights.tensors[name].shape) != shape:
            raise UserError(
                f"{source}: {name} has shape {list(stored)}, config.json says {list(shape)}: "
                "config and weights are of different models"
            )
    return tied_copy


def _none_left(source: Path, missing: list[str], unexpected: list[str], spec: ModelSpec) -> None:
    if missing or unexpected:
        faults = [f"misses {some(missing)}"] * bool(missing)
        faults += [f"has unexpected {some(unexpected)}"] * bool(unexpected)
        raise UserError(
            f"{source} {' and '.join(faults)}: not a {spec.family} model of {spec.num_layers} "
            "layers as its config says; nothing was written"
        )


def _chunks(
    source: Path,
    weights: Weights,
    parameters: Iterable[Parameter],
    spec: ModelSpec,
    dtype: torch.dtype | None,
) -> list[Chunk]:
    """What write_state is to write: one chunk per parameter, layers stacked under one key."""
    chunks: list[Chunk] = []
    key_dtypes: dict[str, torch.dtype] = {}
    for parameter in parameters:
        slot = mapping.slots(parameter, spec)[0]
        found = [dtype or weights.tensors[name].dtype for name in parameter.hf]
        target = key_dtypes.setdefault(slot.key, found[0])
        if set(found) != {target}:
            raise UserError(
                f"{source}: {', '.join(parameter.hf)} are stored as {some(list(map(str, found)))}, "
                f"but {slot.key} can have one dtype only, {target} so far: name one with --dtype"
            )
        load = partial(_load_hf, weights, parameter, spec, slot.shape, target)
        chunks.append(Chunk(slot, target, load))
    return chunks


def _load_hf(
    weights: Weights,
    parameter: Parameter,
    spec: ModelSpec,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    tensors = [weights.load(name) for name in parameter.hf]
    joined = mapping.join(parameter, tensors, spec)
    del tensors  # so that at most two of the three forms exist at a time
    return joined.to(dtype).reshape(shape)


def _pieces(
    source: Path, reader: StateReader, spec: ModelSpec, dtype: torch.dtype | None
) -> list[Piece]:
    """Every parameter of the model as a Piece, after matching every tensor of the state to one."""
    found: dict[Parameter, Slot] = {}
    missing: list[str] = []
    for parameter in mapping.parameters(spec):
        slots = [s for s in mapping.slots(parameter, spec) if s.key in reader.tensors]
        if slots:
            found[parameter] = slots[0]
        else:
            missing.append(parameter.megatron)
    unexpected = {k for k in reader.tensors if not k.startswith(OPTIMIZER_PREFIXES)}
    unexpected -= {slot.key for slot in found.values()}
    _none_left(source / "state", missing, sorted(unexpected), spec)
    pieces: list[Piece] = []
    for parameter, slot in found.items():
        stored = reader.tensors[slot.key]
        _check_size(source, parameter, slot, tuple(stored.size))
        target = dtype or stored.properties.dtype
        load = partial(_load_state, reader, parameter, slot, spec, target)
        pieces.append(Piece(parameter.hf, target, load))
    return pieces


def _check_size(source: Path, parameter: Parameter, slot: Slot, size: tuple[int, ...]) -> None:
    enough = size[0] >= slot.size[0] if parameter.padded else size[0] == slot.size[0]
    if not enough or size[1:] != slot.size[1:]:
        raise UserError(
            f"{source}: {slot.key} has shape {list(size)}, the model's spec says "
            f"{list(slot.size)}: {folders.MANIFEST} and state are of different models"
        )


def _load_state(
    reader: StateReader, parameter: Parameter, slot: Slot, spec: ModelSpec, dtype: torch.dtype
) -> dict[str, Tensor]:
    tensor = reader.read(slot).reshape(mapping.megatron_shape(parameter, spec))
    parts = mapping.split(parameter, tensor, spec)
    del tensor  # so that at most two of the three forms exist at a time
    return {name: parts.pop(name).to(dtype) for name in parameter.hf}


def _tied_copy(pieces: Iterable[Piece]) -> Piece:
    """The lm_head that the imported folder stored beside its equal embedding."""
    copy, original = mapping.TIED_COPY
    embedding = next(piece for piece in pieces if original in piece.shapes)

    def load() -> dict[str, Tensor]:
        return {copy: embedding.load()[original]}

    return Piece({copy: embedding.shapes[original]}, embedding.dtype, load)
