r"""Medical questions: m23k with the released Llama, Qwen and DeepSeek prompts and responses.

`extra_info` has for each family {family}_prompt, {family}_response_with_thinking and
{family}_reponse_no_thinking (sic); `answer_letter` is the letter of the right option, a column of
its own and the ground truth. The release's script has no columns for DeepSeek, though it has the
strings; here they are. It doubles the braces of \boxed{} in `prompt` and `question_instruction`
(not in what is trained on) and calls the ability "math"; both are put right here.

A source has either the columns of m23k-tokenized (`prompt`, `reasoning`, `distilled_answer_string`,
`answer_letter`, `answer_string`) or those of the released set (`extra_info` with `question`,
`answer_thinking`, `answer_raw`, `answer_letter`). What is there of the latter is kept as it is. The
processed set on the Hub could not be looked at: its columns are those its script writes, and a file
with others is an error that names them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_deft.data.prepare.released import BOXED, M23K, M23K_PROCESSED, MEDICAL
from megatron_deft.data.prepare.sources import Source, open_source
from megatron_deft.data.prepare.splits import (
    Choice,
    Columns,
    Make,
    given_columns,
    keep_given,
    optional_text,
    schema,
    text,
    write_splits,
)
from megatron_deft.errors import UserError

_LAYOUTS = {
    "released": ("extra_info",),
    "m23k": ("prompt", "reasoning", "distilled_answer_string", "answer_letter", "answer_string"),
}
# Column of extra_info -> that of m23k.
_PARTS = {
    "question": "prompt",
    "answer_thinking": "reasoning",
    "answer_raw": "distilled_answer_string",
    "answer_letter": "answer_letter",
    "answer_string": "answer_string",
}
_FAMILY_COLUMNS = ("{}_prompt", "{}_response_with_thinking", "{}_reponse_no_thinking")
_EXTRA = (
    *_PARTS,
    "question_instruction",
    *(column.format(family) for family in MEDICAL for column in _FAMILY_COLUMNS),
)


def prepare_medical(
    out: str | Path,
    sources: Sequence[str] = (M23K_PROCESSED,),
    choice: Choice = Choice(),  # noqa: B008 - it is frozen
) -> dict[str, Any]:
    """Write the folder `out` (train.parquet, val.parquet, info.json); return what info.json holds.

    Args:
        sources: parquet or JSONL files, folders of them, or one id of the Hub.
        choice: which rows, and how (see data.prepare.splits.Choice).

    Errors: UserError as `open_source` and `write_splits`.
    """
    left_out: list[str] = []

    def open_rows() -> tuple[Source, Columns, pa.Schema, Make]:
        source = open_source(sources, "prepare medical OUT")
        layout = source.require(_LAYOUTS)
        also, others = list[str](), list[str]()
        if layout == "released":
            also += filter(source.has, ("data_source",))
            others = given_columns(source, _EXTRA)
        label = source.name or M23K

        def make(index: int, row: Mapping[str, Any]) -> dict[str, Any]:
            given: Mapping[str, Any] = {}
            names = _PARTS
            if layout == "released":
                given = row["extra_info"]
                if not isinstance(given, Mapping):
                    raise UserError("extra_info: expected an object")
                row, names = {**row, **given}, {part: part for part in _PARTS}
            made = _row(row, names, label)
            extra = made["extra_info"] | dict.fromkeys(others)
            extra = keep_given(extra, given, left_out)
            return {**made, "extra_info": {"index": index, **extra}}

        return source, (_LAYOUTS[layout], also), schema([*_EXTRA, *others], ["answer_letter"]), make

    return write_splits(out, open_rows, choice, "medical", {"left_out": left_out}, {})


def _row(row: Mapping[str, Any], names: Mapping[str, str], label: str) -> dict[str, Any]:
    """A row of the result; `names` says under which names `row` has the parts."""
    question, answer = text(row, names["question"]), text(row, names["answer_raw"])
    thinking = text(row, names["answer_thinking"])
    letter = optional_text(row, names["answer_letter"])
    made = {
        "question": question,
        "answer_thinking": thinking,
        "answer_raw": answer,
        "answer_letter": letter,
        "answer_string": optional_text(row, names["answer_string"]),
        "question_instruction": f"{question}\n{BOXED}",
    }
    for family, (prompt, response) in MEDICAL.items():
        texts = prompt(question), response(thinking, answer), answer
        for column, value in zip(_FAMILY_COLUMNS, texts, strict=True):
            made[column.format(family)] = value
    user = {"role": "user", "content": f"{question}\n{BOXED}"}
    return {
        "data_source": optional_text(row, "data_source") or label,
        "prompt": [user],
        "ability": "medical",
        "reward_model": {"style": "rule", "ground_truth": letter},
        "extra_info": made,
        "answer_letter": letter,
        "messages": [user, {"role": "assistant", "content": answer}],
    }
