"""The tokens and positions that two models are compared on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_deft.convert.stages import Batch, Facts
from megatron_deft.errors import UserError

# Texts of the kinds that models are trained on.
PROMPTS = (
    "Conversion is proven by what the model says: 12 + 30 = 42, naïve or not.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Let $t$ be the time.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n",
    "Der Fluss fließt nach Norden. 水は低い方へ流れる。 Вода течёт вниз.",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"]}',
)
COLUMNS = 256  # tokens of a row; a shorter model has fewer
WINDOWS = 4  # sliding windows, at the least, that fit into a row
FAR = 64  # of them, the last ones of a row that stand at far positions
SEED = 20240917
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def make_batch(folders: Sequence[Path], facts: Facts, prompts: Sequence[str] | None) -> Batch:
    """Rows of the same length: random ids, and the prompts one behind the other.

    The last FAR columns hold random ids at positions spread evenly up to the last one that the
    model allows. Rotary attention depends on distances only, so it is these gaps, and no shifted
    sequence, that reach beyond the context a scaled model was first trained with. A model of at
    most COLUMNS positions has no such columns: its rows are as long as it allows.

    Sliding windows are shortened until the rows are longer: at its own size, no row of a few
    hundred tokens would tell a window from none. That both models have the same is asked before.

    Args:
        folders: where to look for a tokenizer; without one there are no prompts.
        facts: of both models.
        prompts: texts in place of PROMPTS.

    Errors: UserError for prompts without a tokenizer, and for a tokenizer beyond the vocabulary.
    """
    last = facts.context_length - 1
    length = min(COLUMNS, last + 1)
    near = length - FAR if last >= length else length
    positions = torch.arange(length)
    positions[near:] = torch.linspace(near, last, length - near, dtype=torch.float64).round().long()
    generator = torch.Generator().manual_seed(SEED)
    texts = [t for t in _prompt_ids(folders, facts, prompts).split(near) if len(t)]
    ids = torch.randint(facts.vocab_size, (1 + len(texts), length), generator=generator)
    for row, text in zip(ids[1:], texts, strict=True):
        row[: len(text)] = text
    return Batch(ids, positions, max(1, length // WINDOWS))


def _prompt_ids(folders: Sequence[Path], facts: Facts, prompts: Sequence[str] | None) -> Tensor:
    """[tokens] int64, none without a tokenizer."""
    having = list(filter(has_tokenizer, folders))
    if not having:
        if prompts:
            raise UserError(
                f"{' and '.join(map(str, folders))} have no tokenizer for the prompts: copy it "
                "there or pass none"
            )
        return torch.empty(0, dtype=torch.int64)
    tokenizer = load_tokenizer(having[0])
    texts = [tokenizer(text)["input_ids"] for text in prompts or PROMPTS]
    ids = torch.tensor([i for text in texts for i in text], dtype=torch.int64)
    if len(ids) and int(ids.max()) >= facts.vocab_size:
        raise UserError(
            f"{having[0]}: the tokenizer makes id {int(ids.max())}, the model has "
            f"{facts.vocab_size} embeddings: tokenizer and model do not belong together"
        )
    return ids


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has a file that a tokenizer is read from."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer as this transformers reads it. Errors: UserError when it cannot."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds: what a library raises that cannot read a file
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder}: this transformers cannot read the tokenizer ({reason}): download its "
            "files again, or use the transformers that wrote them"
        ) from None
