r"""Mathematics: NuminaMath-CoT, its released subset of 67,000, and MATH, for the released trainers.

What the releases do, and this too: the user turn of `prompt` is the problem with a sentence after
it that asks for \boxed; `extra_info.question` is the problem as it is, which is what the published
runs train on (data.prompt_dict_keys: [question]); `extra_info.answer` is the solution; the ground
truth is the last \boxed of it, and a row without one stays, with null. Beyond that
`extra_info.question_instruction` has the problem with the sentence (a name of the medical release).

A source has either the columns of NuminaMath-CoT or MATH (`problem`, `solution`), or those of the
released trainers (`extra_info`), as the subset has and as this module writes. What is there of the
latter is kept as it is, and what is missing is added. The subset's columns could not be looked at;
a file with other columns is an error that names them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_deft.data.prepare.boxed import boxed_answer
from megatron_deft.data.prepare.released import LIGHTEVAL, MATH, NUMINA, NUMINA_SUBSET, SUFFIX
from megatron_deft.data.prepare.sources import Source, open_source
from megatron_deft.data.prepare.splits import (
    Choice,
    Columns,
    DropRow,
    Make,
    given_columns,
    keep_given,
    optional_text,
    schema,
    text,
    write_splits,
)
from megatron_deft.errors import UserError

_LAYOUTS = {"released": ("extra_info",), "problems": ("problem", "solution")}
_ALSO = ("data_source", "reward_model", "source", "level", "type")  # read if there
_LABELS = ("source", "level", "type")  # kept in extra_info


def prepare_math(
    out: str | Path,
    sources: Sequence[str] = (NUMINA_SUBSET,),
    prompt_types: Sequence[str] = (),
    boxed_only: bool = False,
    choice: Choice = Choice(),  # noqa: B008 - it is frozen
) -> dict[str, Any]:
    r"""Write the folder `out` (train.parquet, val.parquet, info.json); return what info.json holds.

    Args:
        sources: parquet or JSONL files, folders of them, or one id of the Hub.
        prompt_types: released prompts to write out besides, as columns of extra_info
            (see data.prepare.released.MATH).
        boxed_only: leave out rows without a \boxed answer, which the releases keep.
        choice: which rows, and how (see data.prepare.splits.Choice).

    Errors: UserError as `open_source` and `write_splits`, and for an unknown prompt type.
    """
    for name in prompt_types:
        if name not in MATH:
            raise UserError(f"--prompt-type {name}: legal are {', '.join(MATH)}")

    left_out: list[str] = []

    def open_rows() -> tuple[Source, Columns, pa.Schema, Make]:
        source = open_source(sources, "prepare math OUT")
        layout = source.require(_LAYOUTS)
        labels = [name for name in _LABELS if source.has(name)]
        columns = _LAYOUTS[layout], list(filter(source.has, _ALSO))
        prompts = {MATH[name][0]: MATH[name][1] for name in prompt_types}
        extra = ["question", "answer", "question_instruction", *labels, *prompts]
        others = given_columns(source, extra) if layout == "released" else []
        label = source.name or _guess(source)

        def make(index: int, row: Mapping[str, Any]) -> dict[str, Any]:
            given = row["extra_info"] if layout == "released" else {}
            if layout == "released":
                if not isinstance(given, Mapping):
                    raise UserError("extra_info: expected an object")
                question, answer = text(given, "question"), text(given, "answer")
            else:
                question, answer = text(row, "problem"), text(row, "solution")
            problem = question.removesuffix(SUFFIX)
            truth = _given_truth(row) or boxed_answer(answer)
            if truth is None and boxed_only:
                raise DropRow("no boxed answer")
            made = {
                "question": question,
                "answer": answer,
                "question_instruction": problem + SUFFIX,
                **{name: optional_text(row, name) for name in labels},
                **{column: write(problem) for column, write in prompts.items()},
                **dict.fromkeys(others),
            }
            user = {"role": "user", "content": problem + SUFFIX}
            return {
                "data_source": optional_text(row, "data_source") or label,
                "prompt": [user],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": truth},
                "extra_info": {"index": index, **keep_given(made, given, left_out)},
                "messages": [user, {"role": "assistant", "content": answer}],
            }

        return source, columns, schema([*extra, *others]), make

    more = {"prompt_types": list(prompt_types), "left_out": left_out}
    asked = {"prompt_types": list(prompt_types), "boxed_only": boxed_only}
    return write_splits(out, open_rows, choice, "math", more, asked)


def _guess(source: Source) -> str:
    """What the data set of local files is called, by the columns that only one of them has."""
    return LIGHTEVAL if source.has("level") else NUMINA if source.has("source") else "math"


def _given_truth(row: Mapping[str, Any]) -> str | None:
    reward = row.get("reward_model")
    return optional_text(reward, "ground_truth") if isinstance(reward, Mapping) else None
