"""FigFont as the paper has it, subsets of it, and easier sets that do not leak."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_deft.data.indexed import open_set
from megatron_deft.data.prepare import figfont
from megatron_deft.data.prepare.figfont import prepare_figfont
from megatron_deft.data.prepare.settings import RowSettings
from megatron_deft.data.prepare.tokenise import prepare_set
from megatron_deft.errors import UserError

pytest.importorskip("reasoning_gym", reason="pip install 'megatron-deft[figfont]'")


@pytest.fixture(scope="module")
def subset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figfont") / "set"
    prepare_figfont(folder, train_size=30, test_size=10, progress=False)
    return folder


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / f"{split}.parquet").to_pylist()


def test_a_subset_is_the_beginning_of_the_papers_set(subset: Path) -> None:
    from reasoning_gym import create_dataset

    oracle = create_dataset("figlet_font", size=10, seed=42, min_word_len=2, max_word_len=5)
    for split, start, size in (("train", 0, 30), ("test", 40_000, 10)):
        made = rows(subset, split)
        assert len(made) == size
        for offset, row in enumerate(made):
            extra = row["extra_info"]
            assert (extra["index"], extra["split"]) == (start + offset, split)
            # the word and the sentence do not depend on the order of fonts, the art does
            entry = oracle[start + offset]
            assert extra["answer"] == entry["answer"]
            assert extra["question"].split("\n")[0] == entry["question"].split("\n")[0]


def test_info_says_what_was_made(subset: Path) -> None:
    info = json.loads((subset / "info.json").read_text())
    assert info["kind"] == "first samples of the paper's"
    assert info["rows"] == {"train": 30, "test": 10}
    assert info["versions"] == figfont.VERSIONS
    train = {row["extra_info"]["answer"] for row in rows(subset, "train")}
    shared = sum(row["extra_info"]["answer"] in train for row in rows(subset, "test"))
    assert info["overlap"]["test_rows_whose_word_is_in_train"] == shared


def test_columns_are_those_of_the_released_trainers(subset: Path) -> None:
    row = rows(subset, "test")[0]
    extra = row["extra_info"]
    assert list(row) == [
        "data_source", "prompt", "ability", "reward_model", "extra_info", "messages",
    ]  # fmt: skip
    assert row["prompt"] == [{"role": "user", "content": extra["question"]}]
    assert row["reward_model"]["ground_truth"] == extra["answer"]
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][1]["content"] == extra["question"]
    assert extra["qwen_prompt"] == (
        f"<|im_start|>system\n{figfont.SYSTEM}<|im_end|>\n<|im_start|>user\n{extra['question']}\n"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert extra["question"] in extra["llama_prompt"]
    assert extra["llama_prompt"].startswith("<|begin_of_text|><|begin_of_text|><|start_header_id|>")


def test_both_formats_train_on_the_answer_alone(
    subset: Path, tokenizer: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    file = str(subset / "train.parquet")
    expected = [row["extra_info"]["answer"] + "<|im_end|>" for row in rows(subset, "train")]
    for changes in (
        {"format": "messages"},
        {"format": "columns"},
        {"use_original_prompt": True, "prompt_dict_keys": ("qwen_prompt",)},
    ):
        prepare_set(tmp_path / "set", [file], tiny_folder, RowSettings(**changes), overwrite=True)
        data = open_set(tmp_path / "set")
        samples = [data[i] for i in range(len(data))]
        assert [tokenizer.decode(s.tokens[s.weights > 0].tolist()) for s in samples] == expected


def test_the_fonts_order_does_not_follow_the_file_system(
    subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reasoning_gym.cognition import figlet_fonts

    elsewhere = sorted(figlet_fonts.OK_FONTS, reverse=True)
    monkeypatch.setattr(figlet_fonts, "OK_FONTS", elsewhere)
    prepare_figfont(tmp_path / "set", train_size=30, test_size=10, progress=False)
    assert rows(tmp_path / "set", "train") == rows(subset, "train")
    assert figlet_fonts.OK_FONTS is elsewhere, "it must be put back"


def test_a_set_that_differs_names_both_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figfont, "PROBE_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"reasoning-gym 0.*pyfiglet 1.*'reasoning-gym==0.1.25'"):
        prepare_figfont(tmp_path / "set", train_size=1, test_size=1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_whole_set_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made small: the check must look at every row of both parts, in order."""
    monkeypatch.setattr(figfont, "TRAIN_SIZE", 3)
    monkeypatch.setattr(figfont, "TEST_SIZE", 2)
    with pytest.raises(UserError, match="do not make the paper's FigFont"):
        prepare_figfont(tmp_path / "set", progress=False)
    with figfont._source(figfont.PAPER) as source:
        whole = [*figfont._draw(source, 0, 3), *figfont._draw(source, 40_000, 2)]
    monkeypatch.setattr(figfont, "PAPER_SHA256", figfont._digest(whole))
    info = prepare_figfont(tmp_path / "set", progress=False)
    assert info["kind"] == "paper"


def test_an_easier_set_keeps_test_words_out_of_train(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "train_size": 300, "test_size": 60, "max_word_len": 2, "fonts": ["3x5", "mini"],
    }  # fmt: skip
    info = prepare_figfont(tmp_path / "a", progress=False, **options)
    assert info["kind"] == "other"
    assert "NOT the paper's" in info["note"]
    assert info["overlap"] == {
        "test_rows_whose_word_is_in_train": 0,
        "test_rows_that_are_in_train": 0,
    }
    assert info["options"]["fonts"] == ["3x5", "mini"]
    made = {split: rows(tmp_path / "a", split) for split in ("train", "test")}
    words = {split: {r["extra_info"]["answer"] for r in part} for split, part in made.items()}
    assert not words["train"] & words["test"]
    assert {len(word) for word in words["train"] | words["test"]} == {2}
    assert {r["extra_info"]["font"] for r in made["train"]} == {"3x5", "mini"}
    assert info["distinct_words"] == {split: len(part) for split, part in words.items()}
    again = prepare_figfont(tmp_path / "b", progress=False, **options)
    assert again == info
    assert rows(tmp_path / "b", "test") == made["test"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 40_001}, "train size 40001: at least 1, and the paper's set has 40000"),
        ({"test_size": 0}, "test size 0"),
        ({"min_word_len": 4, "max_word_len": 3}, "word lengths 4 to 3"),
        ({"min_word_len": 1, "max_word_len": 1}, "choose other word lengths"),
        ({"fonts": ["standrd"]}, "font standrd: not one of FigFont's 447: try standard"),
        ({"fonts": []}, "fonts: name at least one"),
    ],
)
def test_impossible_options_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare_figfont(tmp_path / "set", progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_without_reasoning_gym_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.cognition", None)
    with pytest.raises(UserError, match=r"pip install 'megatron-deft\[figfont\]'"):
        prepare_figfont(tmp_path / "set", progress=False)


def test_an_existing_folder_is_kept_unless_overwritten(subset: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        prepare_figfont(subset, train_size=1, test_size=1, progress=False)
    assert len(rows(subset, "train")) == 30
