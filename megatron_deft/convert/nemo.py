"""Import a NeMo 2 checkpoint into a weights folder, and export weights to one.

Both sides store megatron's own tensors, so nothing is computed: tensors stream from one state to
the other, one in memory, and each is compared bit for bit before the folder gets its name.
"""

import logging
import pickle
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_deft import checkpoint_folder as folders
from megatron_deft.convert import hf, hf_folder, mapping, portable
from megatron_deft.convert.mapping import Parameter
from megatron_deft.convert.nemo_folder import NORMS, Nemo, State, find
from megatron_deft.convert.nemo_models import nemo_config
from megatron_deft.convert.pickles import SafeReader
from megatron_deft.convert.state import Chunk, write_state
from megatron_deft.convert.streams import progress_bar
from megatron_deft.errors import UserError
from megatron_deft.files import atomic_folder
from megatron_deft.hashing import FollowingHashes
from megatron_deft.integrations import nemo_checkpoint
from megatron_deft.models.families import ModelSpec

logger = logging.getLogger(__name__)

PREFIX = "module."  # of NeMo's keys: its LightningModule holds the GPTModel under this name
TOKENIZER = "nemo_tokenizer"  # as NeMo's own importers call the folder
# Modules with an _extra_state: None but for fp8, and yet a strict load asks for it. Megatron's own
# linear layers have one, and so have TransformerEngine's norms and attention.
STATEFUL = (
    "input_layernorm",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
STATEFUL_EXPERTS = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
# What NeMo's importers keep beside the tensors: a training run of no steps, and how to read the
# keys (sharded_state_dict_metadata of its MegatronStrategy).
COMMON = {
    "epoch": 0,
    "global_step": 0,
    "state_dict": {},
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


def import_nemo(
    source: str | Path,
    out: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    base: str | None = None,
) -> Path:
    """Convert a NeMo 2 checkpoint into the weights folder `out`; returns `out`.

    Args:
        source: its folder, or nemo://NAME.
        out: written whole or not at all; layout in megatron_deft/checkpoint_folder.py.
        dtype: "fp32" or "bf16" to convert to; None keeps what is stored.
        overwrite: replace an earlier weights folder at `out`.
        verify: read both again and compare every tensor bit for bit before `out` appears.
        base: the model's name, for the cards of what is trained from it; None: the folder's.

    Errors: UserError naming the file, tensor or setting at fault.
    """
    folder, out = find(source), Path(out)
    hf.check_target(out, folder, overwrite, folders.MANIFEST)
    target = hf.named_dtype(dtype)
    model = Nemo(folder)
    chunks = _chunks(model.state, target, lambda key: key)
    if not model.tokenizer:
        logger.warning("%s holds no tokenizer: put its files into %s", folder, out / "hf")
    logger.info("importing %d tensors of %s", len(chunks), folder)
    with (
        atomic_folder(out, overwrite, _needs(chunks, model.tokenizer), folders.MANIFEST) as new,
        FollowingHashes(new) as hashes,
        progress_bar("import", _bytes(chunks)) as bar,
    ):
        _write_companions(new / "hf", model)
        write_state(new / "state", chunks, bar, hashes.reached)
        folders.write_manifest(
            new,
            files=hashes.finish(folders.list_files(new)),
            kind="weights",
            spec=model.spec.to_json(),
            base=base or hf_folder.base_name(folder, {}),
            dtype=dtype,
            tied_copy=False,
        )
        if verify:
            _require_same(model.state, State(new / "state", model.spec), target)
    return out


def export_nemo(
    folder: str | Path,
    out: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Convert a weights, checkpoint or run folder into the NeMo 2 checkpoint `out`; returns it.

    Args:
        folder: what `checkpoint_folder.resolve` accepts, saved at any parallel layout.
        out: written whole or not at all: context/ by NeMo itself, weights/ as of one rank.
        dtype: "fp32" or "bf16" to convert to; None keeps what is stored.
        overwrite: replace an earlier NeMo checkpoint at `out`.
        verify: read both again and compare every tensor bit for bit before `out` appears.

    Errors: UserError when NeMo is not installed or cannot hold the model, and as `export_hf`.
    """
    source, out = folders.resolve(folder), Path(out)
    hf.check_target(out, source, overwrite, "context")
    target = hf.named_dtype(dtype)
    manifest = folders.read_manifest(source)
    if manifest.get("adapter"):
        raise UserError(
            f"{source} holds adapters: merge them first (`megatron-deft convert export {source} "
            "HF`), import HF, and export that"
        )
    spec = ModelSpec.from_json(manifest["spec"])
    model, config, arguments = nemo_config(spec)
    nemo_checkpoint.require_nemo()
    hf.require_whole(source, checksums=True)
    state = State(source / "state", spec)
    chunks = _chunks(state, target, _nemo_key)
    if model.own_head and spec.tied_embeddings:
        logger.info("the head is stored too: NeMo's connectors know no tied %s", model.name)
        chunks.append(_head(chunks))
    arguments |= _precision({chunk.dtype for chunk in chunks})
    companions = hf_folder.companions(source / "hf")
    logger.info("exporting %s to %s", source, out)
    with (
        atomic_folder(out, overwrite, _needs(chunks, companions), "context") as new,
        tempfile.TemporaryDirectory() as scratch,
        progress_bar("export", _bytes(chunks)) as bar,
    ):
        tokenizer = _tokenizer(source / "hf", Path(scratch) / TOKENIZER)
        nemo_checkpoint.write_context(new / "context", model.name, config, arguments, tokenizer)
        write_state(new / "weights", chunks, bar)
        _add_objects(new / "weights", _extra_states(spec))
        torch.save(COMMON, new / "weights" / "common.pt")
        if verify:
            written = Nemo(new)
            _require_same(state, written.state, target)
    return out


def _chunks(state: State, dtype: torch.dtype | None, key: Callable[[str], str]) -> list[Chunk]:
    """What write_state is to write: one chunk per parameter, layers stacked under one key."""
    chunks: list[Chunk] = []
    key_dtypes: dict[str, torch.dtype] = {}
    for parameter in state.parameters:
        slot = mapping.slots(parameter, state.spec)[0]
        found = dtype or state.dtypes(parameter)[0]
        if key_dtypes.setdefault(slot.key, found) != found:
            raise UserError(
                f"{state.path}: {parameter.megatron} is stored as {found}, the other layers as "
                f"{key_dtypes[slot.key]}: name one with --dtype"
            )
        load = partial(_load, state, parameter, found, slot.shape)
        chunks.append(Chunk(slot._replace(key=key(slot.key)), found, load))
    return chunks


def _load(state: State, parameter: Parameter, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return state.read(parameter, dtype).reshape(shape)


def _nemo_key(key: str) -> str:
    for ours, theirs in NORMS.items():
        key = key.replace(ours, theirs)
    return PREFIX + key


def _head(chunks: Iterable[Chunk]) -> Chunk:
    """The embedding once more, as the head."""
    words = next(c for c in chunks if c.slot.key == f"{PREFIX}embedding.word_embeddings.weight")
    return Chunk(words.slot._replace(key=f"{PREFIX}output_layer.weight"), words.dtype, words.load)


def _bytes(chunks: Iterable[Chunk]) -> int:
    return sum(chunk.bytes for chunk in chunks)


def _needs(chunks: list[Chunk], companions: Iterable[Path]) -> int:
    copied = sum(path.stat().st_size for path in companions)
    return _bytes(chunks) + len(chunks) * hf.HEADER_BYTES + copied


def _precision(dtypes: set[torch.dtype]) -> dict[str, Any]:
    """NeMo's three settings for one dtype; of several, the widest."""
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    return {
        "params_dtype": widest,
        "bf16": widest == torch.bfloat16,
        "fp16": widest == torch.float16,
    }


def _write_companions(folder: Path, model: Nemo) -> None:
    folder.mkdir()
    for path in model.tokenizer:
        hf_folder.copy_companions(path.parent, folder)
    hf_folder.write_json(folder / "config.json", portable.portable_config(
        model.config, model.spec, None
    ))  # fmt: skip


def _tokenizer(companions: Path, folder: Path) -> Path | None:
    """The tokenizer alone, in the spelling of transformers 4, which NeMo 2 has."""
    hf_folder.copy_companions(companions, folder)
    (folder / "config.json").unlink()  # every companion folder has one
    portable.rewrite_tokenizer_config(folder)
    return folder if any(folder.iterdir()) else None


def _extra_states(spec: ModelSpec) -> list[str]:
    """The keys of all _extra_state objects that a NeMo model of `spec` may ask for."""
    layers = range(spec.num_layers)
    count = spec.num_layers
    keys = [f"decoder.layers.{name}._extra_state/shard_{i}_{count}"
            for name in STATEFUL for i in layers]  # fmt: skip
    keys += [
        f"decoder.layers.{name}._extra_state/shard_{i}.{e}_{count}.{spec.experts}"
        for name in STATEFUL_EXPERTS
        for i in layers
        for e in range(spec.experts)
    ]
    return [PREFIX + key for key in (*keys, "decoder.final_layernorm._extra_state/shard_0_1")]


def _add_objects(folder: Path, keys: Iterable[str]) -> None:
    """Store None under each of `keys` in the torch_dist checkpoint `folder`: all share one record.

    A byte record is what torch.save wrote of megatron's list of shards: one of [None] serves all.
    """
    name = "__objects.distcp"
    torch.save([None], folder / name)
    place = _StorageInfo(name, 0, (folder / name).stat().st_size)
    metadata = SafeReader(folder).read_metadata()
    places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
    for key in keys:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        places[MetadataIndex(key)] = place
    with open(folder / ".metadata", "wb") as handle:
        pickle.dump(metadata, handle)


def _require_same(source: State, written: State, dtype: torch.dtype | None) -> None:
    """Errors: UserError naming the first tensor that is not the source's, bit for bit."""
    twins = {parameter.megatron: parameter for parameter in written.parameters}
    for parameter in source.parameters:
        wanted = source.read(parameter, dtype or source.dtypes(parameter)[0])
        twin = twins[parameter.megatron]
        found = written.read(twin, written.dtypes(twin)[0])
        if wanted.dtype != found.dtype or not torch.equal(_bits(wanted), _bits(found)):
            raise UserError(
                f"{written.path}: {parameter.megatron} was not written as it was read: check the "
                "disk and convert again"
            )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
