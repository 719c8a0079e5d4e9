"""Scores against hand-computed values and a second implementation; whole evaluations of real
(tiny) models, interrupted and continued.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
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
from megatron_deft.evaluation import figfont
from megatron_deft.evaluation.engines import Generation, Sampling, make_engine
from megatron_deft.evaluation.figfont import (
    evaluate,
    exact,
    jaro_winkler,
    normalised,
    read_samples,
    render_prompt,
)
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
    ours, released = read_samples(messages_file), read_samples(released_file)
    assert [sample.answer for sample in ours] == WORDS
    assert [(s.question, s.answer) for s in ours] == [(s.question, s.answer) for s in released]
    assert released[0].messages[0] == {"role": "system", "content": SYSTEM}


def test_jsonl_and_worked_examples(tmp_path: Path, model: Path) -> None:
    turns = [("user", "1"), ("assistant", "A"), ("user", "2"), ("assistant", "B")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (sample,) = read_samples(file)
    assert (sample.question, sample.answer) == ("2", "B")
    prompt = render_prompt(AutoTokenizer.from_pretrained(model), sample, "chat")
    assert prompt.endswith(
        "assistant\nA<|im_end|>\n<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_prompt_is_what_training_puts_before_the_answer(
    messages_file: Path, model: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    for sample in read_samples(messages_file):
        rendered = render_messages(tokenizer, sample.messages)
        trained = encode(tokenizer, [rendered])[0]
        prompt = render_prompt(tokenizer, sample, "chat")
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids == trained.tokens[: (trained.weights > 0).argmax()].tolist()


def test_released_prompts(released_file: Path, model: Path) -> None:
    sample = read_samples(released_file)[0]
    for name, template in (("qwen_prompt", QWEN_PROMPT), ("llama_prompt", LLAMA_PROMPT)):
        expected = template.replace("{question}", question(WORDS[0]))
        assert render_prompt(None, sample, name) == expected


def test_two_models_side_by_side(
    model: Path,
    other_model: Path,
    messages_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    results = evaluate([model, other_model], messages_file, out, names=["base", "deft"])
    printed = capsys.readouterr().out
    assert printed.startswith("FigFont: 11 samples, greedy, 5 new tokens")
    assert [line.split()[0] for line in printed.splitlines()[3:]] == ["base", "deft", "-"]
    assert json.loads((out / "results.json").read_text()) == results
    assert results["settings"]["max_new_tokens"] == 5
    assert {"torch", "transformers"} <= set(results["versions"])
    for name in ("base", "deft"):
        header, *records = map(
            json.loads, (out / f"generations_{name}.jsonl").read_text().splitlines()
        )
        assert header["max_new_tokens"] == 5
        assert sorted(record["index"] for record in records) == list(range(11))
        mean = sum(jaro_winkler(r["output"], r["answer"]) for r in records) / 11
        entry = results["models"][name]
        assert entry["scores"]["jaro_winkler"]["mean"] == pytest.approx(mean)
        assert entry["samples"] == 11
        engine = make_engine("transformers", entry["path"], 1)
        for record, sample in zip(
            sorted(records, key=lambda record: record["index"]),
            read_samples(messages_file),
            strict=True,
        ):
            prompt = engine.tokenizer(render_prompt(engine.tokenizer, sample, "chat"))["input_ids"]
            (answer,) = engine.generate([prompt], Sampling(5))
            assert (record["output"], record["answer"]) == (answer.text, sample.answer)
    assert list(tmp_path.iterdir()) == [out]


def test_the_results_file_may_be_named(
    readers: Callable[..., list["Reader"]], model: Path, messages_file: Path, tmp_path: Path
) -> None:
    readers((set(),))
    results = evaluate([model], messages_file, tmp_path / "new" / "scores.json", progress=False)
    assert json.loads((tmp_path / "new" / "scores.json").read_text()) == results
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["generations_first.jsonl", "scores.json"]


class Reader:
    """An engine that reads the art, but for the samples it is told to miss."""

    name, dtype = "reader", "fp32"

    def __init__(self, tokenizer: Any, misses: set[int], fails_after: int | None = None) -> None:
        self.tokenizer, self.misses, self.fails_after = tokenizer, misses, fails_after
        self.asked: list[int] = []

    def generate(
        self, prompts: Sequence[Any], sampling: Any, streams: Sequence[int] | None = None
    ) -> Iterator[Generation]:
        assert streams is not None
        for index in streams:
            if len(self.asked) == self.fails_after:
                raise KeyboardInterrupt
            self.asked.append(index)
            yield Generation("no" if index in self.misses else WORDS[index], 2, True)

    def close(self) -> None:
        pass


@pytest.fixture
def readers(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Reader]]:
    """Let evaluate load these engines, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def use(*options: Any) -> list[Reader]:
        loaded = [Reader(tokenizer, *each) for each in options]
        coming = iter(loaded)
        monkeypatch.setattr(figfont, "make_engine", lambda *_: next(coming))
        return loaded

    return use


def test_known_answers_get_known_scores(
    readers: Callable[..., list[Reader]], model: Path, other_model: Path, messages_file: Path
) -> None:
    readers((set(range(11)),), ({0, 1},))
    models = evaluate([model, other_model], messages_file)["models"]
    assert models["first"]["scores"]["exact"]["mean"] == 0
    second = models["second"]["scores"]["exact"]
    assert second["mean"] == pytest.approx(9 / 11)
    assert second["delta"]["mean"] == pytest.approx(9 / 11)
    assert second["low"] == pytest.approx(0.5230, abs=1e-4)  # Wilson, 9 of 11
    assert models["second"]["generated_tokens"] == 22


def test_an_interrupted_run_is_continued(
    readers: Callable[..., list[Reader]], model: Path, messages_file: Path, tmp_path: Path
) -> None:
    (first,) = readers((set(), 4))
    with pytest.raises(KeyboardInterrupt):
        evaluate([model], messages_file, tmp_path)
    assert not (tmp_path / "results.json").exists()
    (second,) = readers((set(),))
    results = evaluate([model], messages_file, tmp_path, batch_size=2)
    assert sorted(first.asked + second.asked) == list(range(11))
    assert len(first.asked) == 4
    assert results["models"]["first"]["scores"]["exact"]["mean"] == 1
    readers()  # nothing is left to ask: no engine is loaded
    assert evaluate([model], messages_file, tmp_path) == results
    assert evaluate([model], messages_file, tmp_path, limit=2)["data"]["samples"] == 2


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("max_new_tokens", 6, "max_new_tokens"), ("prompt_type", "qwen_prompt", "prompt_type")],
)
def test_other_settings_begin_anew(
    readers: Callable[..., list[Reader]],
    model: Path,
    messages_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: Any,
    named: str,
) -> None:
    readers((set(),), (set(),))
    evaluate([model], messages_file, tmp_path)
    evaluate([model], messages_file, tmp_path, **{option: value})
    assert f"begun anew, since {named} changed" in capsys.readouterr().err


def test_another_model_in_the_same_place_begins_anew(
    readers: Callable[..., list[Reader]], model: Path, messages_file: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    _, second = readers((set(),), ({1},))
    evaluate([copy], messages_file, tmp_path / "out")
    (copy / "model.safetensors").write_bytes(b"other")
    evaluate([copy], messages_file, tmp_path / "out")
    assert len(second.asked) == 11


def test_other_data_begin_anew(
    readers: Callable[..., list[Reader]],
    model: Path,
    messages_file: Path,
    released_file: Path,
    tmp_path: Path,
) -> None:
    _, second = readers((set(),), (set(),))
    evaluate([model], messages_file, tmp_path)
    evaluate([model], released_file, tmp_path)  # the same words under another system turn
    assert len(second.asked) == 11


def table(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, "no column messages or extra_info, it has text"),
        ({"messages": [[USER]]}, "row 0: messages must end with the assistant"),
        ({"extra_info": [{"question": "q"}]}, "row 0: extra_info must hold"),
        ({"extra_info": pa.array([], pa.string())}, "has no rows"),
    ],
)
def test_data_that_is_none(tmp_path: Path, columns: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_samples(table(tmp_path / "test.parquet", **columns))


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
            read_samples(file)
        assert "\n" not in str(caught.value)


def test_bad_options(model: Path, messages_file: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"models": []}, "no model"),
        ({"models": [tmp_path / "absent"]}, "no such folder"),
        ({"names": ["a", "b"]}, "2 names for 1 models"),
        ({"names": ["a/b"]}, "letters, digits"),
        ({"models": [model, model]}, "two models share a name"),
        ({"limit": 0}, "limit=0"),
        ({"prompt_type": "alpaca"}, "prompt_type=alpaca: one of chat, qwen_prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"engine": "tgi"}, "engine=tgi"),
    ):
        arguments: dict[str, Any] = {"models": [model], "data": messages_file, **options}
        with pytest.raises(UserError, match=message):
            evaluate(**arguments)


def test_a_model_without_a_chat_template(model: Path, messages_file: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "model")
    file = copy / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["chat_template"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="no chat template"):
        evaluate([copy], messages_file)
    assert evaluate([copy], messages_file, prompt_type="qwen_prompt")["models"]
