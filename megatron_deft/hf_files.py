"""Which files beside the weights a Hugging Face folder has, and how they are copied."""

import shutil
from collections.abc import Sequence
from pathlib import Path

# What AutoTokenizer reads; config.json decides which class it takes where tokenizer_config.json
# names none.
TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)


def matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of `folder` that a pattern fits."""
    return sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})


def copy_matching(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy the files of `source` that a pattern fits to `target`, under their names there."""
    for path in matching(source, patterns):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
