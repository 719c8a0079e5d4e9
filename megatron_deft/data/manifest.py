"""manifest.json of a prepared set: what it is, what it was made of, and what was left out."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_deft.errors import UserError
from megatron_deft.files import read_json
from megatron_deft.hashing import SEAL, fingerprint, is_entry

MANIFEST = "manifest.json"
FORMAT = "megatron-deft token set"
VERSION = 1
KINDS = ("sft", "pretrain")
TOKENS, INDEX, WEIGHTS = "tokens.bin", "tokens.idx", "weights.bin"
TOKENIZER = "tokenizer"  # the folder of the tokenizer's files
_TYPES: dict[str, tuple[type | None, ...]] = {  # what opening a set needs; None: may be null
    **dict.fromkeys(("samples", "tokens", "trained_tokens", "longest"), (int,)),
    **dict.fromkeys(("tokenizer", "files"), (dict,)),
    "template": (dict, None),
}
_LEGAL: dict[str, tuple[str | None, ...]] = {
    "kind": KINDS,
    "token_dtype": ("uint16", "int32"),
    "weight_dtype": ("uint8", "float32", None),
}
PLACES = 5  # how many places are named of each reason


@dataclass
class Count:
    """How many samples something happened to, and where it did first."""

    count: int = 0
    places: list[str] = field(default_factory=list)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared set, without its own checksum.

    Errors: UserError when `folder` is none, or of a later make, or when its manifest is damaged.

    Keys:
        format, version, megatron_deft, transformers: what wrote it.
        kind: "sft", or "pretrain" (every token is trained, there are no weights).
        samples, tokens, trained_tokens, longest: counts; longest is of one sample, in tokens.
        token_dtype ("uint16" | "int32"), weight_dtype ("uint8" | "float32" | null).
        max_length, truncation: what longer samples met with; max_length null is no limit.
        tokenizer {hash, name, vocab_size}, template {hash, name, text} or null when none was used.
        sources [{file, bytes, xxh3_128}], settings: those of RowSettings.
        dropped, cut: samples left out by reason, and those cut to max_length: {count, places}.
        files {name: {bytes, xxh3_128}}: the three files of the set.
        pieces {name: xxh3_128}: of the tokens and weights, see hash_pieces; older sets have none.
    """
    path = Path(folder) / MANIFEST
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder: name a set that `megatron-deft prepare` wrote")
    missing = (
        f"{folder} is no prepared set, it has no {MANIFEST}: name a folder that "
        "`megatron-deft prepare` wrote"
    )
    found = read_json(path, missing, "prepare the set again")
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path} is not that of a prepared set: name another folder")
    if found.get("version") != VERSION:
        raise UserError(
            f"{path}: version {found.get('version')}, this program reads {VERSION}: "
            "prepare the set again, or update megatron-deft"
        )
    seal = found.pop(SEAL, None)
    if seal is not None and seal != fingerprint(found):
        raise UserError(
            f"{path} is damaged: it does not match its own checksum: prepare the set again"
        )
    wrong = [key for key, legal in _TYPES.items() if not _is_one(found, key, legal)]
    wrong += [key for key, legal in _LEGAL.items() if found.get(key, "") not in legal]
    if wrong or not all(map(is_entry, found["files"].values())):
        raise UserError(f"{path} is damaged ({', '.join(wrong) or 'files'}): prepare the set again")
    return found


def _is_one(found: Mapping[str, Any], key: str, legal: tuple[type | None, ...]) -> bool:
    value = found.get(key)
    return key in found and (None if value is None else type(value)) in legal


def write_manifest(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest, with its own checksum, and return it as read_manifest does.

    `content` is all but format and version.
    """
    whole = {"format": FORMAT, "version": VERSION, **content}
    whole = dict(json.loads(json.dumps(whole)))  # as it is read again
    sealed = {**whole, SEAL: fingerprint(whole)}
    text = json.dumps(sealed, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return whole
