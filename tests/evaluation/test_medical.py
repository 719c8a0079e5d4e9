"""Options found in answers, against answers worked out by hand; files good and bad."""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_deft.data.prepare.medical import prepare_medical
from megatron_deft.errors import UserError
from megatron_deft.evaluation.medical import RULES, TASK, extract_option
from tests.data.prepare.conftest import M23K_ROWS, QUIET, read, write_parquet

OPTIONS = {"A": "Aspirin", "B": "Beta blocker", "C": "Calcium", "D": "Digoxin"}
OVERLAP = {"A": "iron", "B": "iron deficiency", "C": ""}


@pytest.mark.parametrize(
    ("output", "letter", "rule"),
    [
        ("The answer is B. On reflection the answer is C.", "C", "answer is"),
        ("(A), (B): the answer is \n D", "D", "answer is"),
        ("the answer is N", "N", "answer is"),  # no option: wrong whatever the right one is
        ("The answer is Aspirin or B", "A", "answer is"),  # its first letter, as released
        ("The Answer is B", "B", "letter"),  # the words are looked for as they are written
        ("so it is \\boxed{B}", "B", "letter"),
        ("first (A), then *C*.", "C", "letter"),
        ("B", "B", "letter"),
        ("A", "A", "letter"),
        ("A.", "A", "letter"),
        ("A\n\nB: no", "B", "letter"),
        ("答案是D项", "D", "letter"),
        ("C D", "C", "letter"),  # the space is used up by C
        ("C  D", "D", "letter"),
        ("A calcium channel", "C", "option text"),  # an article is no letter
        ("Vitamin E, then calcium, not DIGOXIN", "D", "option text"),
        ("digoxin? no: calcium", "C", "option text"),
        ("asprin", "A", "similarity"),
        ("ABCD", "B", "similarity"),
        ("", "D", "similarity"),  # nothing is like anything: the last
    ],
)
def test_by_hand(output: str, letter: str, rule: str) -> None:
    assert extract_option(output, OPTIONS) == (letter, rule)


def test_texts_within_texts_and_empty_ones() -> None:
    assert extract_option("it is iron deficiency", OVERLAP) == ("A", "option text")  # both at once
    assert extract_option("iron? it is\niron deficiency, iron", OVERLAP) == ("A", "option text")
    assert extract_option("zinc", OVERLAP)[1] == "similarity"


@given(st.text("ABCDEN isanwer.(){}\n是calium"), st.sampled_from("ABCD"))
def test_what_is_said_last_counts(output: str, letter: str) -> None:
    found, rule = extract_option(output, OPTIONS)
    assert found in OPTIONS or rule == "answer is"
    assert extract_option(f"{output}\nthe answer is {letter}.", OPTIONS) == (letter, "answer is")
    if "answer is" not in output:
        boxed = extract_option(f"{output} \\boxed{{{letter}}}", OPTIONS)
        assert boxed == (letter, "letter")


def record(output: str, answer: str) -> dict[str, Any]:
    return {"output": output, "gold": {"options": OPTIONS, "answer": answer}}


def test_scores_and_what_is_told(caplog: pytest.LogCaptureFixture) -> None:
    records = [
        record("the answer is B", "B"), record("the answer is N", "B"), record("\\boxed{C}", "C"),
        record("Digoxin", "D"), record("", "D"), record("", "A"),
    ]  # fmt: skip
    with caplog.at_level(logging.INFO, "megatron_deft"):
        scores = TASK.score(records, 2)
    assert [score["accuracy"] for score in scores] == [1, 0, 1, 1, 1, 0]
    assert caplog.messages == [
        "medical: options of 6 answers found by answer is: 2, letter: 1, option text: 1, "
        "similarity: 2; the last are guesses"
    ]
    assert TASK.score([], 1) == []


def test_a_long_answer_does_not_take_long() -> None:
    output = "the calcium channel is blocked " * 1000 + "z"
    assert extract_option(output.replace("calcium", "potassium"), OPTIONS)[1] == RULES[-1]


def rows(sources: Sequence[str | None] = ("MedQA", "PubMedQA", None)) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"What helps {i}?\nA. Rest\nB. Tea",
            "options": {"A": "Rest", "B": "Tea"},
            "answer_idx": "AB"[i % 2],
            **({} if source is None else {"source": source}),
        }
        for i, source in enumerate(sources)
    ]


def test_every_kind_of_file_has_the_same_questions(tmp_path: Path) -> None:
    array, lines = tmp_path / "set.json", tmp_path / "set.jsonl"
    array.write_text(json.dumps(rows()))
    lines.write_text("\n".join(map(json.dumps, rows())))
    table = tmp_path / "set.parquet"
    wider = [{**row, "options": {**row["options"], "C": None}} for row in rows()]
    pq.write_table(pa.Table.from_pylist(wider), table)
    questions = TASK.read([str(array)])
    assert questions == TASK.read([str(lines)]) == TASK.read([str(table)])
    assert [question.set for question in questions] == ["MedQA", "PubMedQA", "set"]
    assert questions[1].gold == {"options": {"A": "Rest", "B": "Tea"}, "answer": "B"}
    assert len(TASK.read([str(array), str(lines)])) == 6


def test_prompts_are_those_of_training(tmp_path: Path) -> None:
    prepare_medical(
        tmp_path / "out", [str(write_parquet(tmp_path / "m.parquet", M23K_ROWS))], QUIET
    )
    trained = read(tmp_path / "out")
    file = tmp_path / "eval.json"
    options = {"A": "one", "B": "two"}
    asked = [
        {"prompt": row["prompt"], "options": options, "answer_idx": row["answer_letter"]}
        for row in M23K_ROWS
    ]
    file.write_text(json.dumps(asked))
    for question, row in zip(TASK.read([str(file)]), trained, strict=True):
        assert list(question.messages) == row["messages"][:-1]
        for family in ("llama", "qwen", "deepseek"):
            template = TASK.prompts[f"{family}_prompt"]
            assert template is not None
            prompt = template.replace("{question}", question.text)
            assert prompt == row["extra_info"][f"{family}_prompt"]
    assert list(TASK.prompts) == ["chat", "llama_prompt", "qwen_prompt", "deepseek_prompt"]
    assert (TASK.sampling.max_new_tokens, TASK.sampling.temperature, TASK.samples) == (8000, 0, 1)


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("What helps?", "What helps?\nA. Rest\nB. Hot (tea)"),
        ("What helps?\nA. Rest\nB. Hot  (tea)", None),
        ("What helps? (A) Rest (B) Hot (tea)", None),
        ("What helps, Rest or Hot (tea)?", "What helps, Rest or Hot (tea)?\nA. Rest\nB. Hot (tea)"),
        ("What helps?\nA. Rest", "What helps?\nA. Rest\nA. Rest\nB. Hot (tea)"),
    ],
)
def test_a_prompt_without_its_options_gets_them(
    prompt: str, asked: str | None, tmp_path: Path
) -> None:
    options = {"A": "Rest", "B": "Hot (tea)"}
    file = tmp_path / "eval.jsonl"
    file.write_text(json.dumps({"prompt": prompt, "options": options, "answer_idx": "A"}))
    (question,) = TASK.read([str(file)])
    assert question.text == (asked or prompt)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": None}, "prompt: the question as text is needed, got None"),
        ({"prompt": " "}, "prompt: the question"),
        ({"options": ["a", "b"]}, "options: an object of texts by letters from A to N is needed"),
        ({"options": {}}, "options: an object"),
        ({"options": {"1": "a"}}, "options: an object"),
        ({"options": {"AB": "a"}}, "options: an object"),
        ({"options": {"A": 1}}, "options: an object"),
        ({"answer_idx": "C"}, "answer_idx: one of the options' letters A, B is needed, got 'C'"),
        ({"answer_idx": 1}, "answer_idx: one of the options' letters A, B is needed, got 1"),
        ({"answer_idx": ["A"]}, "answer_idx: one of"),
        ({"source": 3}, "source: a name is needed, got 3"),
    ],
)
def test_a_bad_row_is_named(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    good, bad = rows(("MedQA", "MedQA"))
    file.write_text(json.dumps([good, {**bad, **changed}]))
    with pytest.raises(UserError, match=re.escape(f"{file} item 1: {message}")) as caught:
        TASK.read([str(file)])
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    lacking, empty, torn = (tmp_path / name for name in ("l.jsonl", "e.json", "t.json"))
    lacking.write_text('{"prompt": "q"}')
    empty.write_text("[]")
    torn.write_text('[{"prompt": ')
    for file, message in (
        (tmp_path / "absent.json", "absent.json: no such file"),
        (lacking, "l.jsonl line 1: no answer_idx, options, it has prompt"),
        (empty, "e.json: there are no rows"),
        (torn, "t.json: not a JSON array"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            TASK.read([str(file)])
