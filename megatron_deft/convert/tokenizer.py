"""Whether a folder's tokenizer belongs to its model, and whether its files say what is read."""

import logging
from pathlib import Path
from typing import Any

from megatron_deft.convert.hf_folder import read_json
from megatron_deft.convert.tokens import PROMPTS, TOKENIZER_FILES, has_tokenizer, load_tokenizer
from megatron_deft.errors import UserError

logger = logging.getLogger(__name__)


def check_vocabulary(folder: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that makes ids beyond the model's embeddings.

    Looks at tokenizer.json and at the tokens that tokenizer_config.json adds (transformers 4 keeps
    some there alone); without tokenizer.json nothing is known. A smaller tokenizer is usual: models
    pad their embeddings.

    Errors: UserError naming the token, and for a tokenizer.json that cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    from tokenizers import Tokenizer

    try:
        found: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises Exception itself
        raise UserError(f"{path} is damaged ({error}): download it again") from None
    found |= _added(folder / "tokenizer_config.json")
    if not found:
        return
    token, last = max(found.items(), key=lambda item: item[1])
    if last >= vocab_size:
        raise UserError(
            f"{path}: the vocabulary has {last + 1} tokens (the last is {token!r}), vocab_size in "
            f"config.json is {vocab_size}: use the model's own tokenizer, or resize its embeddings "
            "with transformers first"
        )


def _added(path: Path) -> dict[str, int]:
    """Tokens that tokenizer_config.json adds."""
    config = read_json(path, "tokenizer's config") if path.exists() else {}
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(map(_is_added, added.items())):
        raise UserError(
            f"{path}: added_tokens_decoder is not a content for each number: download it again"
        )
    return {entry["content"]: int(number) for number, entry in added.items()}


def _is_added(item: tuple[str, Any]) -> bool:
    number, entry = item
    named = isinstance(entry, dict) and isinstance(entry.get("content"), str)
    return named and number.isdecimal()


def warn_of_none(folder: Path, remedy: str) -> None:
    """Log what a folder without a tokenizer will be missed for."""
    if not has_tokenizer(folder):
        logger.warning(
            "%s has no tokenizer (%s): training on texts, chat and evaluation need one, and an "
            "export has none: %s",
            folder,
            " or ".join(TOKENIZER_FILES),
            remedy,
        )


def disagreement(folder: Path) -> str | None:
    """What this transformers reads otherwise than tokenizer.json says; None when nothing.

    transformers 5 gives some families a tokenizer of its own, made of the file's vocabulary and its
    own rules for splitting a text (all of Qwen 2): another version may then make other ids.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    import transformers
    from tokenizers import Tokenizer

    read, written = load_tokenizer(folder), Tokenizer.from_file(str(path))
    for text in PROMPTS:
        ids = read(text, add_special_tokens=False)["input_ids"]
        if ids != written.encode(text, add_special_tokens=False).ids:
            return (
                f"{path}: transformers {transformers.__version__} reads it as "
                f"{type(read).__name__}, which makes other ids than the file says, such as for "
                f"{text[:40]!r}: train and serve with the same version of transformers"
            )
    return None
