r"""Medical multiple choice: which option does a model's answer name? Accuracy per source.

Rows have the fields of the released evaluation file: prompt, options {A: text, ...}, answer_idx
(the right letter) and source. A prompt of m23k already ends with its options as lines `A. text`;
one that lacks any of them gets all of them in that form. The written-out prompts are the ones that
`prepare medical` trains on, and "chat" asks what its messages ask.

The option is taken from the answer by four rules, tried in order; each takes the LAST match. They
are those of the released evaluation (HuatuoGPT-o1's, as m1 and DEFT use them), with its quirks: a
match uses up the marks around it, and the fourth rule always finds something.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from megatron_deft.data.prepare.released import BOXED, MEDICAL
from megatron_deft.data.rows import RowError, find_rows
from megatron_deft.errors import UserError
from megatron_deft.evaluation.engines import Sampling
from megatron_deft.evaluation.results import Metric
from megatron_deft.evaluation.task import Question, Record, Task

LETTERS = "ABCDEFGHIJKLMN"  # an option's name is one of them
RULES = ("answer is", "letter", "option text", "similarity")
GUESS = RULES[-1]  # the answer names no option: the most similar text is taken
MAX_NEW_TOKENS = 8000
# "chat" goes through the tokenizer's chat template; the others are the released strings.
PROMPTS: dict[str, str | None] = {
    "chat": None,
    **{f"{family}_prompt": prompt("{question}") for family, (prompt, _) in MEDICAL.items()},
}

_log = logging.getLogger(__name__)
_FIELDS = ("prompt", "options", "answer_idx")
_ANSWER_IS = re.compile(rf"answer is\s*([{LETTERS}])")
_MARK = r"[\W\u4e00-\u9fff]"  # Chinese characters count as marks: they stand without spaces


def extract_option(output: str, options: Mapping[str, str]) -> tuple[str, str]:
    """The letter that an answer names, and which of RULES found it.

    1. "answer is": after these words, any of A-N, also one that is no option or begins a word.
    2. "letter": an option's letter between marks or ends of the text, but not an "A" before a
       space, which is taken for the article.
    3. "option text": of the options whose text is there, in any case, the one that begins last.
    4. "similarity": difflib's most similar option text, the last of equals.

    An empty option text is found nowhere.
    """
    if found := _ANSWER_IS.findall(output):
        return found[-1], RULES[0]
    alone = rf"(?:^|{_MARK})(?!A )([{''.join(options)}])(?:{_MARK}|$)"
    if found := re.findall(alone, output):
        return found[-1], RULES[1]
    lowered = output.lower()
    texts = {letter: text.lower() for letter, text in options.items()}
    places = {letter: lowered.rfind(text) for letter, text in texts.items() if text}
    if places and max(places.values()) >= 0:
        return max(places, key=lambda letter: places[letter]), RULES[2]
    # The order of the two texts and the last of equals are the released ones; both matter.
    ratios = {key: SequenceMatcher(None, text, lowered).ratio() for key, text in texts.items()}
    return max(reversed(ratios), key=lambda letter: ratios[letter]), GUESS


def score(records: Sequence[Record], workers: int = 1) -> list[dict[str, float]]:
    """Whether each answer names the right option: {"accuracy": 1 or 0}.

    Logs one line that tells how many options each rule found. `workers` are not needed: the longest
    answers take 20 milliseconds each.
    """
    del workers
    found = [extract_option(record["output"], record["gold"]["options"]) for record in records]
    counts = Counter(rule for _, rule in found)
    if not found:
        return []
    _log.info(
        "medical: options of %d answers found by %s; the last are guesses",
        len(found),
        ", ".join(f"{rule}: {counts[rule]}" for rule in RULES),
    )
    return [
        {"accuracy": float(letter == record["gold"]["answer"])}
        for (letter, _), record in zip(found, records, strict=True)
    ]


def read(files: Sequence[str]) -> list[Question]:
    """The questions of JSON, JSONL or parquet files; a row without a source has its file's name.

    Errors: UserError for a file that is missing, damaged or empty, and for a row whose prompt,
    options or answer_idx is missing or wrong, naming its place.
    """
    questions = []
    for file in files:
        for where, row in find_rows([file], _FIELDS, ["source"]):
            if isinstance(row, RowError):
                raise UserError(f"{where}: {row}") from row
            questions.append(_question(where, row, Path(file).stem))
    if not questions:
        raise UserError(f"{', '.join(files) or 'medical'}: there are no rows")
    return questions


def _question(where: str, row: Mapping[str, Any], name: str) -> Question:
    prompt, answer, source = row["prompt"], row["answer_idx"], row.get("source") or name
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: prompt: the question as text is needed, got {prompt!r:.80}")
    if not isinstance(source, str):
        raise UserError(f"{where}: source: a name is needed, got {source!r:.80}")
    options = _options(where, row["options"])
    if not isinstance(answer, str) or answer not in options:
        raise UserError(
            f"{where}: answer_idx: one of the options' letters {', '.join(options)} is needed, "
            f"got {answer!r:.80}"
        )
    text = prompt if _has(prompt, options) else f"{prompt}\n{_lines(options)}"
    user = {"role": "user", "content": f"{text}\n{BOXED}"}
    return Question(source, text, (user,), {"options": options, "answer": answer})


def _options(where: str, options: Any) -> dict[str, str]:
    """Letter -> text. In parquet every row has the letters of all rows: those without text go."""
    given = options.items() if isinstance(options, Mapping) else ()
    found = {letter: text for letter, text in given if text is not None}
    right = all(letter in [*LETTERS] and isinstance(text, str) for letter, text in found.items())
    if not found or not right:
        raise UserError(
            f"{where}: options: an object of texts by letters from A to N is needed, such as "
            f'{{"A": "yes", "B": "no"}}, got {options!r:.80}'
        )
    return found


def _lines(options: Mapping[str, str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in options.items())


def _has(prompt: str, options: Mapping[str, str]) -> bool:
    """Whether a prompt names every option: its letter, up to three marks, its text."""
    words = " ".join(prompt.split())
    return all(
        re.search(rf"\b{letter}\W{{1,3}}{re.escape(' '.join(text.split()))}", words)
        for letter, text in options.items()
    )


TASK = Task(
    name="medical",
    title="Medical",
    read=read,
    prompts=PROMPTS,
    metrics={"accuracy": Metric("accuracy", True)},
    score=score,
    sampling=Sampling(MAX_NEW_TOKENS),
)
