"""Import a Hugging Face folder into Megatron state and export Megatron state to one.

One process, no GPU, no TransformerEngine; tensors stream, so memory holds one parameter in both
forms whatever the model's size. Each direction accounts for every tensor by name and shape, proves
by logits that both models are the same (convert/verify.py), and then gives the folder its name.
"""

import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert import card, hf_folder, mapping, portable, tokenizer
from megatron_deft.convert import verify as proof
from megatron_deft.convert.adapters import open_ours
from megatron_deft.convert.hf_folder import Piece, some
from megatron_deft.convert.mapping import Parameter, Slot
from megatron_deft.convert.sources import HFSource, Source
from megatron_deft.convert.state import DATA_SUFFIX, Chunk, write_state
from megatron_deft.convert.streams import nothing_follows, progress_bar
from megatron_deft.errors import UserError
from megatron_deft.files import atomic_folder
from megatron_deft.hashing import FollowingHashes

HEADER_BYTES = 4096  # at most, of one tensor, in either format
logger = logging.getLogger(__name__)


def import_hf(
    hf_dir: str | Path,
    out: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    base: str | None = None,
) -> Path:
    """Convert the Hugging Face folder `hf_dir` into the weights folder `out`; returns `out`.

    Args:
        hf_dir: config.json, safetensors (one file, or shards with an index), tokenizer files; or
            the name of a model in the local cache (`hf download NAME`).
        out: written whole or not at all; layout in megatron_deft/checkpoint_folder.py.
        dtype: "fp32" or "bf16" to convert to; None keeps what is stored.
        overwrite: replace an earlier weights folder at `out`.
        verify: prove that both models are the same before `out` appears (convert/verify.py).
        base: the model's name, for the cards of what is trained from it; None: base_name().

    The state holds the vocabulary without padding: megatron zero-fills the padding of whatever
    layout loads it. Errors: UserError naming the file, tensor or config field at fault.
    """
    folder, out = hf_folder.find(hf_dir), Path(out)
    check_target(out, folder, overwrite, folders.MANIFEST)
    target_dtype = named_dtype(dtype)
    source = HFSource(folder)
    tokenizer.check_vocabulary(folder, source.spec.vocab_size)
    tokenizer.warn_of_none(folder, "put the model's tokenizer files there and import again")
    if verify:
        proof.require_readable(folder)
    chunks = _chunks(source, target_dtype)
    logger.info("importing %d tensors of %s", len(source.weights.tensors), folder)
    total = sum(chunk.bytes for chunk in chunks)
    with (
        atomic_folder(
            out, overwrite, _needs(total, len(chunks), folder), folders.MANIFEST
        ) as target,
        FollowingHashes(target) as hashes,
        progress_bar("import", total) as bar,
    ):
        hf_folder.copy_companions(folder, target / "hf")
        # What trains may be another transformers than what wrote it.
        portable.rewrite_tokenizer_config(target / "hf")
        write_state(target / "state", chunks, bar, hashes.reached)
        folders.write_manifest(
            target,
            files=hashes.finish(folders.list_files(target)),
            kind="weights",
            spec=source.spec.to_json(),
            base=base or hf_folder.base_name(folder, source.config),
            license=card.read_license(folder),
            dtype=dtype,
            tied_copy=source.tied_copy,
        )
        if verify:
            proof.require_equal(folder, target, dtype)
    return out


def export_hf(
    folder: str | Path,
    out: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    shard_bytes: int = hf_folder.SHARD_BYTES,
    base: str | Path | None = None,
) -> Path:
    """Convert a weights, checkpoint or run folder into the Hugging Face folder `out`; returns it.

    Args:
        folder: what `checkpoint_folder.resolve` accepts, saved at any parallel layout.
        out: written whole or not at all: safetensors, config.json, tokenizer, README.md.
        dtype: "fp32" or "bf16" to convert to; None keeps what is stored.
        overwrite: replace an earlier Hugging Face folder at `out`.
        verify: prove that both models are the same before `out` appears (convert/verify.py).
        shard_bytes: largest safetensors file, bytes.
        base: of a checkpoint of adapters, which are merged: where its base lies now, if not where
            it was.

    Every file of the source is compared with its checksum before `out` appears. Without `verify`
    a training checkpoint's tensor files are compared by size only: they hold far more than weights.

    Errors: UserError naming the file, tensor or setting at fault.
    """
    folder, out = folders.resolve(folder), Path(out)
    check_target(out, folder, overwrite, "config.json")
    target_dtype = named_dtype(dtype)
    manifest = folders.read_manifest(folder)
    large = {name for name in manifest["files"] if name.endswith(DATA_SUFFIX)}
    require_whole(folder, checksums=manifest["files"].keys() - large)
    hashes = FollowingHashes(folder)
    follow = verify or manifest["kind"] == "weights"
    source = open_ours(folder, hashes.reached if follow else nothing_follows, base)
    pieces = _pieces(source, target_dtype)
    if manifest.get("tied_copy"):
        pieces.append(_tied_copy(pieces))
    config = hf_folder.read_json(folder / "hf" / "config.json", "model's config")
    dtypes = {piece.dtype for piece in pieces}
    tokenizer.warn_of_none(folder / "hf", f"put the model's tokenizer files into {out}")
    logger.info("exporting %s to %s", folder, out)
    if source.has_heads:
        logger.warning("%s: its heads of multi-token prediction are left out", folder)
    total = sum(piece.bytes for piece in pieces)
    with (
        atomic_folder(
            out, overwrite, _needs(total, len(pieces), folder / "hf"), "config.json"
        ) as target,
        hashes,
        progress_bar("export", total) as bar,
    ):
        hf_folder.copy_companions(folder / "hf", target)
        hf_folder.write_weights(target, pieces, shard_bytes, bar)
        if follow:
            require_whole(folder, checksums=large, known=hashes.finish(large))
        uniform = dtypes.pop() if len(dtypes) == 1 else None
        hf_folder.write_json(
            target / "config.json", portable.portable_config(config, source.spec, uniform)
        )
        portable.rewrite_tokenizer_config(target)
        folders.write_source(target, manifest)
        (target / "README.md").write_text(card.model_card(manifest), encoding="utf-8")
        if verify:
            proof.require_equal(target, folder, dtype, base)
            if warning := tokenizer.disagreement(target):
                logger.warning("%s", warning)
    return out


def named_dtype(name: str | None) -> torch.dtype | None:
    """The dtype that --dtype names; None for None. Errors: UserError with the legal names."""
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


def require_whole(source: Path, **how: Any) -> None:
    """Errors: UserError with what checkpoint_folder.verify(source, **how) found, or a stray."""
    if problems := folders.verify(source, **how):
        raise UserError(f"{source} is damaged: {'; '.join(problems)}: use another checkpoint")
    if found := folders.strays(source):
        raise UserError(found[0])


def check_target(out: Path, source: Path, overwrite: bool, marker: str) -> None:
    """Refuse to write over, above or into the source, and over what is not of the kind to come.

    Nor into any other weights or checkpoint folder: its hf/ looks like an earlier export.
    """
    target, origin = (Path(os.path.realpath(path)) for path in (out, source))
    if target.is_symlink():
        raise UserError(f"{out} is a link that leads to itself: name another output folder")
    if target in (origin, *origin.parents):
        raise UserError(f"{out} holds the source {source}: name another output folder")
    if origin in target.parents:
        raise UserError(f"{out} lies in the source {source}: name an output folder outside it")
    holder = next((p for p in target.parents if (p / folders.MANIFEST).exists()), None)
    if holder is not None:
        raise UserError(
            f"{out} lies in {holder}, which has a {folders.MANIFEST} of its own: name an output "
            "folder outside it"
        )
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists already: name another folder or pass --overwrite")
    if not out.is_dir() or (any(out.iterdir()) and not (out / marker).exists()):
        raise UserError(f"{out} has no {marker}, so it is not overwritten: remove it yourself")


def _chunks(source: HFSource, dtype: torch.dtype | None) -> list[Chunk]:
    """What write_state is to write: one chunk per parameter, layers stacked under one key."""
    chunks: list[Chunk] = []
    key_dtypes: dict[str, torch.dtype] = {}
    for parameter in source.parameters:
        slot = mapping.slots(parameter, source.spec)[0]
        found = [dtype or stored for stored in source.dtypes(parameter)]
        target = key_dtypes.setdefault(slot.key, found[0])
        if set(found) != {target}:
            raise UserError(
                f"{source.path}: {', '.join(parameter.hf)} are stored as "
                f"{some(list(map(str, found)))}, but {slot.key} can have one dtype only, {target} "
                "so far: name one with --dtype"
            )
        chunks.append(Chunk(slot, target, partial(_load_slot, source, parameter, slot, target)))
    return chunks


def _load_slot(source: HFSource, parameter: Parameter, slot: Slot, dtype: torch.dtype) -> Tensor:
    return source.read(parameter, dtype).reshape(slot.shape)


def _pieces(source: Source, dtype: torch.dtype | None) -> list[Piece]:
    """What write_weights is to write: the Hugging Face tensors of one parameter together."""
    pieces: list[Piece] = []
    for parameter in source.parameters:
        target = dtype or source.dtypes(parameter)[0]
        pieces.append(Piece(parameter.hf, target, partial(_split, source, parameter, target)))
    return pieces


def _split(source: Source, parameter: Parameter, dtype: torch.dtype) -> dict[str, Tensor]:
    return mapping.split(parameter, source.read(parameter, dtype), source.spec)


def _tied_copy(pieces: Iterable[Piece]) -> Piece:
    """The lm_head that the imported folder stored beside its equal embedding."""
    copy, original = mapping.TIED_COPY
    embedding = next(piece for piece in pieces if original in piece.shapes)

    def load() -> dict[str, Tensor]:
        return {copy: embedding.load()[original]}

    return Piece({copy: embedding.shapes[original]}, embedding.dtype, load)
