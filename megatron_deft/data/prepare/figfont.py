"""FigFont: read the word that ASCII art spells. Made by reasoning-gym, nothing is downloaded.

The DEFT paper's set is 45,000 samples of reasoning-gym 0.1.25 (task figlet_font, seed 42, words of
2 to 5 letters) with pyfiglet 1.0.2: indices 0-39,999 train, 40,000-44,999 test. Any other words or
fonts make another set: it is recorded as such and its words are split, so that no test word is
trained on. In the paper's own split most test words also occur in train (in other fonts).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from megatron_deft.data.prepare.figfont_fonts import FONTS
from megatron_deft.data.prepare.released import LLAMA_BOS, llama, qwen
from megatron_deft.errors import UserError
from megatron_deft.files import atomic_folder

TRAIN_SIZE, TEST_SIZE = 40_000, 5_000
_START = {"train": 0, "test": TRAIN_SIZE}
PAPER = {"min_word_len": 2, "max_word_len": 5, "seed": 42, "fonts": list(FONTS)}
# sha256 of json.dumps([[question, answer], ...]): of the whole set, and of its first rows, which
# is looked at even when a few samples are made
PAPER_SHA256 = "d467fcdd54ec55cdb9bcdea72acd0c019312d9e616cd226c1bc8513cd0e72961"
PROBE_SIZE = 64
PROBE_SHA256 = "0650bdd4a427b29d48a5ad878674121f5dc3806f61ff36d032f910ef5bda838e"
VERSIONS = {"reasoning-gym": "0.1.25", "pyfiglet": "1.0.2"}
_ONE_TEST_WORD_IN = 10  # in any other set, one word in so many is kept for test
_NOTES = {
    True: "The DEFT paper's split. Test words occur in train too, in other fonts: see overlap.",
    False: "NOT the paper's split: other words, fonts or seed. No test word is trained on.",
}

# The released evaluation's strings (Beyond-Log-Likelihood, evaluations/figfont/main.py).
SYSTEM = (
    "You are an expert at decoding Figlet Font ASCII art. When given Figlet Font text, identify "
    "the word it represents and output only that without any explanations or additional text."
)
QWEN_PROMPT = qwen(SYSTEM, "{question}\n")
LLAMA_PROMPT = 2 * LLAMA_BOS + llama(SYSTEM, "{question}")


@dataclass(frozen=True)
class Sample:
    """One word drawn in one font."""

    index: int
    question: str
    answer: str
    font: str


def prepare_figfont(
    out: str | Path,
    train_size: int | None = None,
    test_size: int | None = None,
    min_word_len: int = 2,
    max_word_len: int = 5,
    fonts: Sequence[str] | None = None,
    seed: int = 42,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the folder `out` (train.parquet, test.parquet, info.json); return what info.json holds.

    With the defaults this is the paper's set; `train_size` and `test_size` take the first so many
    of each part of it. Other word lengths, `fonts` (pyfiglet names; None is all) or `seed` make
    another set, with disjoint words in train and test. The same arguments give the same rows.
    `progress` shows a bar on a terminal. The whole set takes less than a minute.

    Errors: UserError when reasoning-gym is missing, an option is out of range, the paper's set
    comes out different (other package versions), or `out` exists and `overwrite` is false.
    """
    options = {
        "min_word_len": min_word_len,
        "max_word_len": max_word_len,
        "seed": seed,
        "fonts": list(FONTS if fonts is None else fonts),
    }
    sizes = {
        "train": TRAIN_SIZE if train_size is None else train_size,
        "test": TEST_SIZE if test_size is None else test_size,
    }
    is_paper = options == PAPER
    is_whole = is_paper and sizes == {"train": TRAIN_SIZE, "test": TEST_SIZE}
    _check(options, sizes, is_paper)
    with atomic_folder(out, overwrite) as folder, _source(options) as source:
        if is_paper:
            _verify(_draw(source, 0, PROBE_SIZE), PROBE_SHA256)
            words = dict.fromkeys(sizes, source.words)
        else:
            words = _split_words(source.words, seed)
        made: dict[str, list[Sample]] = {}
        with tqdm(
            total=sum(sizes.values()),
            desc="figfont",
            unit=" rows",
            disable=None if progress else True,
        ) as bar:
            for split, size in sizes.items():
                source.words = words[split]
                made[split] = []
                for sample in _draw(source, _START[split], size):
                    made[split].append(sample)
                    bar.update()
        if is_whole:
            _verify(made["train"] + made["test"], PAPER_SHA256)
        info = {
            "data_set": "figfont",
            "kind": "paper"
            if is_whole
            else "first samples of the paper's"
            if is_paper
            else "other",
            "note": _NOTES[is_paper],
            **_counts(made),
            "versions": _versions(),
            "options": options,
        }
        for split, rows in made.items():
            pq.write_table(_table(split, rows), folder / f"{split}.parquet", compression="zstd")
        (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    return info


def _check(options: dict[str, Any], sizes: dict[str, int], is_paper: bool) -> None:
    shortest, longest = options["min_word_len"], options["max_word_len"]
    if not 1 <= shortest <= longest:
        raise UserError(f"word lengths {shortest} to {longest}: 1 <= min <= max is needed")
    for (split, size), most in zip(sizes.items(), (TRAIN_SIZE, TEST_SIZE), strict=True):
        if size < 1 or (is_paper and size > most):
            raise UserError(
                f"{split} size {size}: at least 1"
                + (f", and the paper's set has {most}" if is_paper else "")
            )
    if not options["fonts"]:
        raise UserError("fonts: name at least one, or leave the option out for all of them")
    for font in options["fonts"]:
        if font not in FONTS:
            near = get_close_matches(font, FONTS, 3) or ["standard", "banner", "big"]
            raise UserError(
                f"font {font}: not one of FigFont's {len(FONTS)}: try {', '.join(near)}"
            )


@contextmanager
def _source(options: dict[str, Any]) -> Iterator[Any]:
    """reasoning-gym's data set, drawing from these fonts in this order while the block runs."""
    try:
        import pyfiglet
        from reasoning_gym.cognition import figlet_fonts
    except ImportError as error:
        raise UserError(
            "FigFont is made by reasoning-gym, which is not installed: "
            "pip install 'megatron-deft[figfont]'"
        ) from error
    missing = sorted(set(options["fonts"]) - set(pyfiglet.FigletFont.getFonts()))
    if missing:
        raise UserError(f"{_differs()}: no font {', '.join(missing[:5])}")
    config = figlet_fonts.FigletFontConfig(
        min_word_len=options["min_word_len"],
        max_word_len=options["max_word_len"],
        space_letters=True,
        seed=options["seed"],
    )
    try:
        source = figlet_fonts.FigletFontDataset(config)
    except AssertionError as error:  # it knows no word of that length
        raise UserError(f"reasoning-gym: {error}: choose other word lengths") from error
    # It parses a font anew for every sample; keeping them makes the whole set six times faster.
    parsed = cache(pyfiglet.Figlet)
    kept = figlet_fonts.OK_FONTS, figlet_fonts.pyfiglet
    figlet_fonts.OK_FONTS = options["fonts"]
    figlet_fonts.pyfiglet = SimpleNamespace(
        figlet_format=lambda text, font: parsed(font).renderText(text)
    )
    try:
        yield source
    finally:
        figlet_fonts.OK_FONTS, figlet_fonts.pyfiglet = kept


def _split_words(words: Iterable[str], seed: int) -> dict[str, list[str]]:
    """Disjoint words for train and test, by a hash so that adding words moves no other."""
    ordered = sorted(
        {word.upper() for word in words},
        key=lambda word: hashlib.blake2b(f"{seed} {word}".encode()).digest(),
    )
    kept = max(1, len(ordered) // _ONE_TEST_WORD_IN)
    if kept == len(ordered):
        raise UserError(f"only the word {ordered[0]} has that length: choose other word lengths")
    return {"train": ordered[kept:], "test": ordered[:kept]}


def _draw(source: Any, start: int, size: int) -> Iterator[Sample]:
    for index in range(start, start + size):
        entry = source[index]
        yield Sample(index, entry["question"], entry["answer"], entry["metadata"]["font"])


def _digest(samples: Iterable[Sample]) -> str:
    pairs = [[sample.question, sample.answer] for sample in samples]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _verify(samples: Iterable[Sample], expected: str) -> None:
    if _digest(samples) != expected:
        raise UserError(_differs())


def _differs() -> str:
    have = ", ".join(f"{name} {number}" for name, number in _versions().items())
    need = " ".join(f"'{name}=={number}'" for name, number in VERSIONS.items())
    return f"{have} do not make the paper's FigFont: pip install {need}"


def _versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONS}


def _counts(made: dict[str, list[Sample]]) -> dict[str, Any]:
    words = {split: [sample.answer for sample in rows] for split, rows in made.items()}
    pairs = {split: [(s.question, s.answer) for s in rows] for split, rows in made.items()}
    seen_words, seen_pairs = set(words["train"]), set(pairs["train"])
    return {
        "rows": {split: len(rows) for split, rows in made.items()},
        "distinct_words": {split: len(set(rows)) for split, rows in words.items()},
        "distinct_pairs": {split: len(set(rows)) for split, rows in pairs.items()},
        "overlap": {
            "test_rows_whose_word_is_in_train": sum(word in seen_words for word in words["test"]),
            "test_rows_that_are_in_train": sum(pair in seen_pairs for pair in pairs["test"]),
        },
        "sha256": _digest(made["train"] + made["test"]),
    }


def _table(split: str, samples: Iterable[Sample]) -> pa.Table:
    """The released trainers' columns, and `messages` for any tokenizer's own chat template."""
    return pa.Table.from_pylist(
        [
            {
                "data_source": "figlet_font",
                "prompt": [{"role": "user", "content": sample.question}],
                "ability": "figfont",
                "reward_model": {"style": "rule", "ground_truth": sample.answer},
                "extra_info": {
                    "split": split,
                    "index": sample.index,
                    "question": sample.question,
                    "answer": sample.answer,
                    "qwen_prompt": QWEN_PROMPT.format(question=sample.question),
                    "llama_prompt": LLAMA_PROMPT.format(question=sample.question),
                    "font": sample.font,
                },
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": sample.question},
                    {"role": "assistant", "content": sample.answer},
                ],
            }
            for sample in samples
        ]
    )
