"""A tokenizer on disk, and what tells it from another: hashes of what decides about ids.

The hash is of the rules (normaliser, splitting, vocabulary, merges, added tokens) and of the two
special tokens that samples get. It leaves out what changes no id of a sample: where the folder is,
padding and truncation (state of the last call), the post-processor (no special tokens are ever
added by it here) and the decoder. Rejected: hashing the files, since transformers 4 and 5 write the
same tokenizer into different ones.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from megatron_deft.errors import UserError
from megatron_deft.hf_files import TOKENIZER_FILES, copy_matching

_IRRELEVANT = ("version", "truncation", "padding", "post_processor", "decoder")
_SPECIAL = ("bos_token", "eos_token")


def load_tokenizer(folder: str | Path, template: str | None = None) -> Any:
    """The tokenizer of a folder, with the chat `template` (a name or a file) in place of its own.

    Errors: UserError when transformers cannot read one there, or knows no such template.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(
            f"{folder} is not a folder: name the model's Hugging Face folder, or download one "
            "(hf download NAME --local-dir DIR)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds: transformers 4 raises AttributeError for no file
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: no tokenizer that transformers can read ({reason}): copy the model's "
            "tokenizer files into it"
        ) from error
    if template is not None:
        from megatron_deft.data.templates import apply_template

        apply_template(tokenizer, template)
    return tokenizer


def vocab_size(tokenizer: Any) -> int:
    """One more than the highest id."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_hash(tokenizer: Any) -> str:
    """32 hex digits, equal for tokenizers that make the same ids of the same samples."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = _canonical(json.loads(backend.to_str())) if backend else _vocabulary(tokenizer)
    rules["special"] = {name: getattr(tokenizer, name) for name in _SPECIAL}
    return _digest(rules)


def template_text(tokenizer: Any) -> str | None:
    """The tokenizer's chat template; several named ones as a JSON object."""
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        return json.dumps(dict(sorted(template.items())), ensure_ascii=False)
    return template or None


def template_hash(text: str | None) -> str | None:
    """32 hex digits of a chat template; None of none."""
    return None if text is None else str(xxh3_128(text.encode()).hexdigest())


def save_tokenizer(source: Path, tokenizer: Any, target: Path) -> None:
    """Copy the tokenizer's files of `source` to the new folder `target`, with the template in use.

    The files are copied and not written anew: each version of transformers writes its own.
    """
    target.mkdir()
    copy_matching(source, target, TOKENIZER_FILES)
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(target, local_files_only=True, trust_remote_code=False)
    if template_text(read) != template_text(tokenizer):
        write_template(target, template_text(tokenizer))
        read = AutoTokenizer.from_pretrained(target, local_files_only=True, trust_remote_code=False)
    assert template_text(read) == template_text(tokenizer)
    assert tokenizer_hash(read) == tokenizer_hash(tokenizer)


def write_template(folder: Path, text: str | None) -> None:
    """Make `text` the one chat template of a tokenizer's folder."""
    for path in folder.glob("chat_template*"):
        path.unlink()
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    config = folder / "tokenizer_config.json"
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        content.pop("chat_template", None)
        config.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    if text is not None:
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def _canonical(rules: dict[str, Any]) -> dict[str, Any]:
    """A backend's own description, without what changes no id and as every version writes it."""
    model = rules["model"]
    if model.get("merges"):  # "a b" before tokenizers 0.20
        model["merges"] = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    rules["added_tokens"] = sorted(rules["added_tokens"], key=lambda token: int(token["id"]))
    slim = {key: _without_defaults(v) for key, v in rules.items() if key not in _IRRELEVANT}
    slim["model"]["vocab"] = model["vocab"]
    return slim


def _without_defaults(value: Any) -> Any:
    """Without false, null and empty entries: a newer library writes more of them."""
    if isinstance(value, dict):
        slim = {
            key: _without_defaults(v)
            for key, v in value.items()
            if key not in ("vocab", "merges", "trim_offsets")
        }
        slim = {key: v for key, v in slim.items() if v not in (None, False, "", [], {})}
        return slim | {key: value[key] for key in ("merges",) if value.get(key)}
    return [_without_defaults(v) for v in value] if isinstance(value, list) else value


def _vocabulary(tokenizer: Any) -> dict[str, Any]:
    """What is known of a tokenizer without a `tokenizers` backend."""
    added = tokenizer.added_tokens_decoder.items()
    return {
        "class": type(tokenizer).__name__,
        "vocab": tokenizer.get_vocab(),
        "added_tokens": [[int(number), str(token), bool(token.special)] for number, token in added],
    }


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return str(xxh3_128(text.encode()).hexdigest())
