"""A model's Hugging Face folder: whether it is one, its tokenizer, and what ends its answers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_deft.checkpoint_folder import MANIFEST
from megatron_deft.data.task import one_line
from megatron_deft.errors import UserError
from megatron_deft.files import read_json

# What ends a turn or a text in the families we know. Base models often name one of them as eos and
# are trained to write another, so each that the vocabulary has ends a generation.
END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek's spelling)
    "</s>",
)

ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def check_folder(folder: str | Path) -> Path:
    """`folder` if it looks like a Hugging Face model. Errors: UserError with what to do."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder: name a Hugging Face folder "
            "(`hf download NAME --local-dir FOLDER` fetches one)"
        )
    if (path / MANIFEST).exists() or (path / "checkpoints").is_dir():
        raise UserError(
            f"{path} holds Megatron weights: run `megatron-deft convert export {path} HF_FOLDER` "
            "and evaluate HF_FOLDER"
        )
    config = path / "config.json"
    read_json(
        config,
        f"{path}: no config.json in it: name a whole Hugging Face model folder",
        "fetch it again",
    )
    return path


def check_attention(folder: Path, config: Any) -> None:
    """No part of `config`, transformers' own, names attention code that the Hub would send.

    Errors: UserError naming it. transformers 4 fetches and runs whatever kernel a config names.
    """
    name = getattr(config, "_attn_implementation", None)
    if name is not None and name not in ATTENTION:
        raise UserError(
            f"{folder}: its config.json asks for the attention implementation {name}, which would "
            f"be code from elsewhere: legal are {', '.join(ATTENTION)}; take it out of the file"
        )
    for part in vars(config).values():
        if hasattr(part, "_attn_implementation"):
            check_attention(folder, part)


def check_loaded(folder: Path, found: Mapping[str, Any]) -> None:
    """Errors: UserError where a part of the model would keep its random weights.

    found: what transformers tells of its loading.
    """
    kinds = {"missing_keys": "has no tensor", "mismatched_keys": "has another size of tensor"}
    for kind, what in kinds.items():
        entries = found.get(kind) or ()  # a name, or with two sizes
        names = sorted(each if isinstance(each, str) else str(each[0]) for each in entries)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{folder} {what} {', '.join(names[:3])}{more}, which its config.json asks for: "
                "fetch or export the model again"
            )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Errors: UserError when there is none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers 4 raises AttributeError for a missing file
        raise UserError(
            f"{folder}: its tokenizer does not load ({one_line(error)}): copy the base model's "
            "tokenizer files into it"
        ) from error


def end_ids(tokenizer: Any, folder: Path) -> frozenset[int]:
    """Ids that end a generation: every eos of the folder and the tokenizer, and END_TOKENS."""
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[token] for token in END_TOKENS if token in vocabulary}
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        eos = config.get("eos_token_id")
        ids |= {eos} if isinstance(eos, int) else set(eos or [])
    return frozenset(ids)
