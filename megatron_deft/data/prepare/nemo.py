"""Rows as NeMo's FineTuningDataModule reads them: lines of {"input": prompt, "output": answer}.

The prompt is whole, rendered by the chat template, and the answer ends with its end of turn, so
that NeMo has only to put the two together: with the dataset_kwargs of our recipes
(integrations/nemo_settings.py) its tokens and its mask are those of a prepared set. Rejected: to
leave the eos to NeMo (add_eos), which puts one after answers that it has cut as well, and only ever
the tokenizer's.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_deft.data.prepare.samples import Counts, Tokeniser
from megatron_deft.data.prepare.settings import RowSettings, columns_of
from megatron_deft.data.rows import cut, detect_format, release
from megatron_deft.data.samples import Rendered
from megatron_deft.data.tokenizer import load_tokenizer
from megatron_deft.errors import UserError
from megatron_deft.files import atomic_folder

SPLITS = ("training", "validation")  # NeMo's names of the files, without .jsonl


def write_nemo(
    out: str | Path,
    files: Mapping[str, Sequence[str]],
    tokenizer_folder: str | Path,
    settings: RowSettings | None = None,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, dict[str, int]]:
    """Write OUT/training.jsonl and OUT/validation.jsonl; the folder appears whole.

    Args:
        files: of each of SPLITS: parquet, JSONL or JSON files of prompts and responses, or of
            conversations with one trained turn.
        tokenizer_folder: a Hugging Face folder; its chat template writes the prompts, unless
            settings.template or settings.use_original_prompt says otherwise.
        settings: how rows are read; lengths are NeMo's business.
        overwrite: replace `out`, which must have a training.jsonl.
        progress: a bar on stderr, where that is a terminal.

    Returns, of each split, "rows" written and "dropped" (with settings.bad_rows="drop").
    Errors: UserError for a file or row that cannot be used, named, and when no row is left.
    """
    settings = settings or RowSettings()
    tokenizer = load_tokenizer(tokenizer_folder, settings.template)
    forms = {split: detect_format(settings, files[split]) for split in SPLITS}
    needs = sum(Path(file).stat().st_size for names in files.values() for file in names)
    found = {}
    with atomic_folder(out, overwrite, needs, f"{SPLITS[0]}.jsonl") as folder:
        for split in SPLITS:
            counts = Counts()
            tokeniser = Tokeniser(tokenizer, settings, forms[split])
            rows = _lines(tokeniser, files[split], counts)
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
                written = 0
                for line in tqdm(rows, split, unit=" rows", disable=None if progress else True):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    written += 1
            if not written:
                raise UserError(f"{', '.join(files[split])}: no row is left for {split}")
            dropped = sum(tally.count for tally in counts.dropped.values())
            found[split] = {"rows": written, "dropped": dropped}
    return found


def _lines(tokeniser: Tokeniser, files: Sequence[str], counts: Counts) -> Iterator[dict[str, str]]:
    needed, optional = columns_of(tokeniser.settings, tokeniser.form)
    try:
        for task in cut(files, [*needed, *optional], tokeniser.settings.limit):
            for row, rendered in tokeniser.rendered(task, counts):
                try:
                    yield _line(rendered)
                except UserError as error:
                    tokeniser.refuse(task, counts, row, error)
    finally:
        release()


def _line(rendered: Rendered) -> dict[str, str]:
    prompt, answer = rendered.pieces[:2]
    if any(rendered.weights[2:]):
        raise UserError(
            "the conversation has several trained turns, NeMo learns one answer: set `train: "
            "false` on all but the last, or train with megatron-deft train"
        )
    if rendered.weights[1] != 1:
        raise UserError(
            f"the turn has weight {rendered.weights[1]:g}, which NeMo has no place for: leave it "
            "out, or train with megatron-deft train"
        )
    for name, text in (("prompt", prompt), ("answer", answer)):
        if text != text.strip(" "):
            raise UserError(
                f"the {name} begins or ends with a space, which NeMo takes away: mend the text, or "
                "train with megatron-deft train"
            )
    return {"input": prompt, "output": answer}
