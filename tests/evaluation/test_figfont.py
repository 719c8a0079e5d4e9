"""Scores against hand-computed values and a second implementation; questions and prompts."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_deft.data.chat import encode, render_messages
from megatron_deft.data.prepare.figfont import LLAMA_PROMPT, QWEN_PROMPT, SYSTEM
from megatron_deft.errors import UserError
from megatron_deft.evaluation.figfont import (
    TASK,
    exact,
    jaro_winkler,
    normalised,
    read_questions,
    score,
)
from megatron_deft.evaluation.prompts import render_prompt
from tests.evaluation.conftest import WORDS, question


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [  # jaro and boost written out
        ("martha", "marhta", 17 / 18 + 0.3 * 1 / 18),  # two differing pairs: one transposition
        ("dwayne", "duane", 37 / 45 + 0.1 * 8 / 45),  # d a n e of 6 and of 5
        ("dixon", "dicksonx", 23 / 30 + 0.2 * 7 / 30),  # d i o n of 5 and of 8; x is too far
        ("abcdef", "bcadef", 11 / 12),  # three differing pairs count as 1.5, not as 1
        ("ab", "axyz", 7 / 12 + 0.1 * 5 / 12),  # below 0.7, and boosted all the same
        ("abcdex", "abcdey", 8 / 9 + 0.4 * 1 / 9),  # five letters shared, four count
        ("a", "ab", 5 / 6 + 0.1 * 1 / 6),  # a window of 0, not of -1
        ("ab", "ba", 0.0),  # nothing in a window of 0
        ("abc", "xyz", 0.0),
        ("", "x", 0.0),
        ("x", "", 0.0),
        ("", "", 1.0),
        (" Cat\n", "CAT", 1.0),
        ("CRATE", "trace", 11 / 15),  # r a e of 5 and of 5
    ],
)
def test_jaro_winkler_by_hand(prediction: str, answer: str, score: float) -> None:
    assert jaro_winkler(prediction, answer) == pytest.approx(score, abs=1e-12)


def slow_jaro_winkler(first: str, second: str) -> Fraction:
    """From the definition alone, in whole numbers: a list of matched pairs of positions."""
    first, second = first.lower().strip(), second.lower().strip()
    if first == second:
        return Fraction(1)
    reach = max(0, max(len(first), len(second)) // 2 - 1)
    pairs: list[tuple[int, int]] = []
    for i in range(len(first)):
        free = [
            j
            for j in range(len(second))
            if abs(i - j) <= reach and first[i] == second[j] and j not in [b for _, b in pairs]
        ]
        if free:
            pairs.append((i, min(free)))
    if not pairs:
        return Fraction(0)
    columns = list(zip(sorted(a for a, _ in pairs), sorted(b for _, b in pairs), strict=True))
    half = Fraction(len([1 for i, j in columns if first[i] != second[j]]), 2)
    m = len(pairs)
    jaro = (Fraction(m, len(first)) + Fraction(m, len(second)) + (m - half) / m) / 3
    prefix = max(n for n in range(5) if first[:n] == second[:n] and n <= len(second))
    return jaro + Fraction(min(prefix, len(first)), 10) * (1 - jaro)


LETTERS = st.text("abcAB \n", max_size=9)


@given(LETTERS, LETTERS)
@example("abcdef", "bcadef")
def test_jaro_winkler_equals_the_definition(prediction: str, answer: str) -> None:
    score = jaro_winkler(prediction, answer)
    assert score == pytest.approx(float(slow_jaro_winkler(prediction, answer)), abs=1e-12)
    assert 0 <= score <= 1
    assert (score == 1) == (normalised(prediction, answer) == 1)


@given(st.text(max_size=12), st.text(max_size=12))
def test_the_scores_are_ordered(prediction: str, answer: str) -> None:
    scores = [score(prediction, answer) for score in (exact, normalised, jaro_winkler)]
    assert scores == sorted(scores)
    assert exact(answer, answer) == jaro_winkler(answer.swapcase(), answer.swapcase()) == 1


def test_exact_and_normalised() -> None:
    assert (exact("CAT", "CAT"), exact("cat", "CAT"), exact("CAT ", "CAT")) == (1, 0, 0)
    assert (normalised(" cat\n", "CAT"), normalised("ca t", "CAT")) == (1, 0)


def test_both_column_shapes_give_the_same_questions(
    messages_file: Path, released_file: Path
) -> None:
    ours, released = read_questions([str(messages_file)]), read_questions([str(released_file)])
    assert [asked.gold["answer"] for asked in ours] == WORDS
    assert [(q.text, q.gold, q.set) for q in ours] == [(q.text, q.gold, q.set) for q in released]
    assert released[0].messages[0] == {"role": "system", "content": SYSTEM}


def test_jsonl_and_worked_examples(tmp_path: Path, model: Path) -> None:
    turns = [("user", "1"), ("assistant", "A"), ("user", "2"), ("assistant", "B")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (asked,) = read_questions([str(file)])
    assert (asked.text, asked.gold) == ("2", {"answer": "B"})
    prompt = render_prompt(AutoTokenizer.from_pretrained(model), asked, None)
    assert prompt.endswith(
        "assistant\nA<|im_end|>\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_prompt_is_what_training_puts_before_the_answer(
    messages_file: Path, model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    for asked in read_questions([str(messages_file)]):
        answer = {"role": "assistant", "content": asked.gold["answer"]}
        trained = encode(tokenizer, [render_messages(tokenizer, [*asked.messages, answer])])[0]
        prompt = render_prompt(tokenizer, asked, TASK.prompts["chat"])
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids == trained.tokens[: (trained.weights > 0).argmax()].tolist()


def test_released_prompts(released_file: Path) -> None:
    asked = read_questions([str(released_file)])[0]
    for name, template in (("qwen_prompt", QWEN_PROMPT), ("llama_prompt", LLAMA_PROMPT)):
        expected = template.replace("{question}", question(WORDS[0]))
        assert render_prompt(None, asked, TASK.prompts[name]) == expected


def test_every_answer_gets_the_three_scores() -> None:
    records = [{"output": "cat ", "gold": {"answer": "CAT"}}]
    assert score(records, 2) == [{"exact": 0.0, "normalised": 1.0, "jaro_winkler": 1.0}]


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, "no column messages or extra_info, it has text"),
        ({"messages": [[USER]]}, "row 0: messages must end with the assistant"),
        ({"messages": [[{"role": "user"}, ANSWER]]}, "row 0: messages must be objects of"),
        ({"messages": [[{"content": "q"}, ANSWER]]}, "row 0: messages must be objects of"),
        ({"messages": [[USER, {**ANSWER, "content": None}]]}, "row 0: messages must be objects of"),
        ({"messages": [["q", "a"]]}, "row 0: messages must be objects of"),
        ({"messages": ["q"]}, "row 0: messages must end"),
        ({"extra_info": [{"question": "q"}]}, "row 0: extra_info must hold"),
        ({"extra_info": ["q"]}, "row 0: extra_info must hold"),
        ({"extra_info": pa.array([], pa.string())}, "has no rows"),
    ],
)
def test_data_that_is_none(tmp_path: Path, columns: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_questions([str(table(tmp_path / "test.parquet", **columns))])


def test_files_that_are_none(tmp_path: Path) -> None:
    torn, empty = tmp_path / "torn.parquet", tmp_path / "empty.jsonl"
    torn.write_bytes(b"PAR1")
    empty.write_text("")
    for file, message in (
        (tmp_path / "absent.parquet", "no such file"),
        (torn, "not a whole parquet file"),
        (empty, "it has no rows"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_questions([str(file)])
        assert "\n" not in str(caught.value)
