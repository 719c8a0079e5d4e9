"""From the rows of one task to its samples, and a count of those that are left out."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_deft.data.chat import encode, render_columns, render_messages
from megatron_deft.data.manifest import PLACES
from megatron_deft.data.prepare.settings import RowSettings, columns_of, text_at, uses_template
from megatron_deft.data.rows import option, place, read_task
from megatron_deft.data.samples import Encoded, Rendered
from megatron_deft.data.task import RowError, Task
from megatron_deft.errors import UserError

_ROWS_AT_ONCE = 256  # rows given to the tokenizer in one call
_REASON = 120  # characters
TOO_LONG, UNTRAINED = "too long", "no trained token within max_length"


@dataclass
class Tally:
    """How many rows of a task something happened to, and the first of them by number."""

    count: int = 0
    rows: list[int] = field(default_factory=list)

    def add(self, row: int) -> None:
        """Count a row."""
        self.count += 1
        if len(self.rows) < PLACES:
            self.rows.append(row)


@dataclass
class Counts:
    """What a task came to. rows: all its rows or lines, empty ones included."""

    rows: int = 0
    dropped: dict[str, Tally] = field(default_factory=dict)
    cut: Tally = field(default_factory=Tally)


class Tokeniser:
    """Turns tasks into samples under one tokenizer and settings."""

    def __init__(self, tokenizer: Any, settings: RowSettings, form: str) -> None:
        """Errors: UserError when the tokenizer lacks what the format `form` needs."""
        self.tokenizer, self.settings, self.form = tokenizer, settings, form
        self._needed, self._optional = columns_of(settings, form)
        self._render = {
            "columns": self._columns, "messages": self._messages, "text": self._text
        }[form]  # fmt: skip
        name = tokenizer.name_or_path
        if form != "messages" and tokenizer.eos_token is None:
            raise UserError(
                f"tokenizer {name} has no eos_token, so no text would end: set eos_token in its "
                "tokenizer_config.json"
            )
        if uses_template(settings, form) and not tokenizer.chat_template:
            raise UserError(
                f"tokenizer {name} has no chat template: name one ({option('template')}), or for "
                f"prompts that are already written out set {option('use_original_prompt')}"
            )

    def samples(self, task: Task, counts: Counts) -> Iterator[Encoded]:
        """The samples of a task, in order; `counts` is filled on the way.

        Errors: UserError naming the row, for one that cannot be used or is too long, where the
        settings do not say to leave it out.
        """
        rendered = self.rendered(task, counts)
        while block := list(islice(rendered, _ROWS_AT_ONCE)):
            for row, sample in self._encoded(task, counts, block):
                fit = self._fitted(task, counts, row, sample)
                if fit is not None:
                    yield fit

    def rendered(self, task: Task, counts: Counts) -> Iterator[tuple[int, Rendered]]:
        """The number and the text of each row that can be used; errors as of `samples`."""
        for row, item in enumerate(read_task(task, self._needed, self._optional)):
            counts.rows = row + 1
            if item is None:
                continue
            try:
                if isinstance(item, RowError):
                    raise item
                rendered = self._render(item)
                if not all(0 <= weight < math.inf for weight in rendered.weights):  # or NaN
                    raise UserError("a weight is negative or no finite number: give one from 0 on")
            except UserError as error:
                self.refuse(task, counts, row, error)
            else:
                yield row, rendered

    def _encoded(
        self, task: Task, counts: Counts, block: list[tuple[int, Rendered]]
    ) -> Iterator[tuple[int, Encoded]]:
        try:
            samples = encode(self.tokenizer, [rendered for _, rendered in block])
        except UserError as error:
            if len(block) == 1:
                self.refuse(task, counts, block[0][0], error)
                return
            for one in block:  # which of them?
                yield from self._encoded(task, counts, [one])
            return
        yield from ((row, sample) for (row, _), sample in zip(block, samples, strict=True))

    def _fitted(self, task: Task, counts: Counts, row: int, sample: Encoded) -> Encoded | None:
        """The sample as it is kept, or None."""
        weights = sample.weights
        if self.form == "text":
            eos = np.int32(self.tokenizer.eos_token_id)
            return Encoded(np.append(sample.tokens, eos), np.append(weights, np.float32(1)))
        limit = self.settings.max_length
        is_long = limit is not None and len(sample.tokens) > limit
        if is_long and self.settings.truncation == "error":
            raise UserError(
                f"{place(task, row)}: {len(sample.tokens)} tokens, more than max_length={limit}: "
                f"raise {option('max_length')}, or set {option('truncation')} to right or drop"
            )
        if is_long and self.settings.truncation == "drop":
            counts.dropped.setdefault(TOO_LONG, Tally()).add(row)
            return None
        if not weights[1:limit].any():  # the first token is never a label
            counts.dropped.setdefault(UNTRAINED, Tally()).add(row)
            return None
        if not is_long:
            return sample
        counts.cut.add(row)
        return Encoded(sample.tokens[:limit], weights[:limit])

    def refuse(self, task: Task, counts: Counts, row: int, error: UserError) -> None:
        """Count a row that cannot be used. Errors: UserError where the settings say so."""
        if self.settings.bad_rows == "error":
            raise UserError(
                f"{place(task, row)}: {error} (to leave such rows out: {option('bad_rows')} drop)"
            ) from error
        counts.dropped.setdefault(_reason(error), Tally()).add(row)

    def _columns(self, row: Mapping[str, Any]) -> Rendered:
        cfg = self.settings
        prompt, response = (
            text_at(row, getattr(cfg, f"{name}_key"), getattr(cfg, keys), option(keys))
            for name, keys in (("prompt", "prompt_dict_keys"), ("response", "response_dict_keys"))
        )
        return render_columns(self.tokenizer, prompt, response, cfg.use_original_prompt)

    def _messages(self, row: Mapping[str, Any]) -> Rendered:
        key = self.settings.messages_key
        messages = row[key]
        if messages is None:
            raise UserError(f"{key} is null")
        if not isinstance(messages, list):
            kind = type(messages).__name__
            raise UserError(f"{key}: expected a list of messages, got {kind}")
        return render_messages(self.tokenizer, messages, row.get(self.settings.tools_key))

    def _text(self, row: Mapping[str, Any]) -> Rendered:
        key = self.settings.text_key
        text = text_at(row, key, (), option("text_key"))
        if not text:
            raise UserError(f"{key} is empty")
        if not _is_unicode(text):
            raise UserError(f"{key} has half a character (a lone surrogate): mend the text")
        return Rendered((text,), (1.0,))


def _is_unicode(text: str) -> bool:
    """Whether it can be written; JSON can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: UserError) -> str:
    """What errors of one fault have in common: without numbers and quoted values."""
    if isinstance(error, RowError):
        return error.reason
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", str(error))
    return re.sub(r"\d+", "N", text)[:_REASON]


@dataclass(frozen=True)
class Part:
    """The samples of one task: lengths int32 [n], tokens and weights [sum of lengths]."""

    lengths: NDArray[np.int32]
    tokens: NDArray[Any]
    weights: NDArray[Any]
    counts: Counts


def make_part(tokeniser: Tokeniser, task: Task, token_dtype: str) -> Part:
    """All samples of a task; weights are uint8 where each is 0 or 1, else float32."""
    counts = Counts()
    samples = list(tokeniser.samples(task, counts))
    weights = _joined([sample.weights for sample in samples], np.float32)
    is_mask = bool(np.isin(weights, (0, 1)).all())
    return Part(
        np.array([len(sample.tokens) for sample in samples], np.int32),
        _joined([sample.tokens for sample in samples], np.dtype(token_dtype)),
        weights.astype(np.uint8) if is_mask else weights,
        counts,
    )


def _joined(arrays: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(arrays).astype(dtype) if arrays else np.empty(0, dtype)
