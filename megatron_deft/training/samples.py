"""The run's tokenizer, and its first sample as training sees it."""

import sys
from pathlib import Path
from typing import Any

from megatron_deft.config import RunConfig
from megatron_deft.data import tokenizer as tokenizers
from megatron_deft.data.batches import collate
from megatron_deft.data.chat import render_sample
from megatron_deft.data.mixture import Rows
from megatron_deft.errors import UserError
from megatron_deft.models.families import ModelSpec


def load_tokenizer(cfg: RunConfig, folder: Path, spec: ModelSpec) -> Any:
    """The tokenizer among a model's files, with the chat template that the run asks for.

    Errors: UserError when the model is too small for it.
    """
    tokenizer = tokenizers.load_tokenizer(folder, cfg.data.template)
    if len(tokenizer) > spec.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model {spec.vocab_size}: "
            "resize the model's embeddings before converting it, or use its own tokenizer"
        )
    return tokenizer


def first_sample(rows: Rows, tokenizer: Any) -> str:
    """The first sample with its trained tokens marked, in colour on a terminal."""
    first = rows.documents(0)[0]
    batch = collate([[first]], len(first.tokens) - 1, packed=False)
    color = sys.stdout.isatty()
    text = render_sample(tokenizer, batch["tokens"][0], batch["labels"][0], color)
    return f"first sample (trained tokens {'in green' if color else 'between ⟦ and ⟧'}):\n{text}\n"
