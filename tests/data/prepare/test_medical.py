r"""m23k: released prompts and responses, the answer letter, and the processed set."""

from pathlib import Path

import pytest

from megatron_deft.cli import main
from megatron_deft.data.prepare.medical import prepare_medical
from megatron_deft.data.prepare.released import BOXED, M23K, MEDICAL
from megatron_deft.errors import UserError
from tests.data.prepare.conftest import M23K_ROWS, QUIET, read, write_jsonl, write_parquet


def test_rows_have_every_familys_prompt_and_responses(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "m.parquet", M23K_ROWS)
    info = prepare_medical(tmp_path / "out", [str(file)], QUIET)
    assert info["rows"] == {"train": 3, "val": 3}
    source, row = M23K_ROWS[1], read(tmp_path / "out")[1]
    question, answer = source["prompt"], source["distilled_answer_string"]
    user = {"role": "user", "content": f"{question}\n{BOXED}"}
    extra = row.pop("extra_info")
    assert row == {
        "data_source": M23K,
        "prompt": [user],
        "ability": "medical",
        "reward_model": {"style": "rule", "ground_truth": "B"},
        "answer_letter": "B",
        "messages": [user, {"role": "assistant", "content": answer}],
    }
    expected = {
        "split": "train",
        "index": 1,
        "question": question,
        "question_instruction": f"{question}\n{BOXED}",
        "answer_thinking": source["reasoning"],
        "answer_raw": answer,
        "answer_letter": "B",
        "answer_string": "two",
    }
    for family, (prompt, response) in MEDICAL.items():
        expected[f"{family}_prompt"] = prompt(question)
        expected[f"{family}_response_with_thinking"] = response(source["reasoning"], answer)
        expected[f"{family}_reponse_no_thinking"] = answer
    assert extra == expected


def test_a_row_without_a_letter_is_counted(tmp_path: Path) -> None:
    rows = [M23K_ROWS[0], {**M23K_ROWS[1], "answer_letter": None}]
    file = write_jsonl(tmp_path / "m.jsonl", rows)
    info = prepare_medical(tmp_path / "out", [str(file)], QUIET)
    assert info["no_ground_truth"] == {"count": 1, "first": [f"{file} line 2"]}
    assert [row["answer_letter"] for row in read(tmp_path / "out")] == ["A", None]


def test_the_processed_set_is_kept_as_it_is(tmp_path: Path) -> None:
    """With the columns that the released script writes."""
    extra = {
        "split": "train", "index": 5, "answer_letter": "C", "answer_string": "three",
        "answer_thinking": "hm", "answer_raw": "\\boxed{C}", "question": "Q?",
        "question_instruction": "Q?\nput it in \\boxed{{}}.", "qwen_prompt": "their prompt",
        "qwen_response_with_thinking": "their thoughts", "llama_prompt": "theirs too",
        "llama_response_with_thinking": "and this", "llama_reponse_no_thinking": "\\boxed{C}",
        "qwen_reponse_no_thinking": "\\boxed{C}",
    }  # fmt: skip
    row = {"data_source": M23K, "source": "MedQA", "ability": "math", "extra_info": extra}
    file = write_parquet(tmp_path / "p.parquet", [row])
    info = prepare_medical(tmp_path / "out", [str(file)], QUIET)
    made = read(tmp_path / "out")[0]
    assert {name: made["extra_info"][name] for name in extra} == {**extra, "index": 0}
    prompt, response = MEDICAL["deepseek"]
    assert made["extra_info"]["deepseek_prompt"] == prompt("Q?")
    assert made["extra_info"]["deepseek_response_with_thinking"] == response("hm", "\\boxed{C}")
    assert (made["answer_letter"], made["reward_model"]["ground_truth"]) == ("C", "C")
    assert info["left_out"] == []


def test_missing_columns_name_those_there_and_those_needed(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "m.jsonl", [{"question": "Q?", "answer": "A"}])
    with pytest.raises(
        UserError,
        match=r"m\.jsonl: it has the columns question, answer; needed: extra_info, or prompt, "
        "reasoning, distilled_answer_string, answer_letter, answer_string",
    ):
        prepare_medical(tmp_path / "out", [str(file)], QUIET)
    file = write_jsonl(tmp_path / "e.jsonl", [{"extra_info": {"question": "Q?"}}])
    with pytest.raises(UserError, match=r"e\.jsonl line 1: answer_raw: expected text, got null"):
        prepare_medical(tmp_path / "out", [str(file)], QUIET)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "m.jsonl", M23K_ROWS)
    command = ["prepare", "medical", str(tmp_path / "out"), "--source", str(file)]
    for more, said in (
        (["--thinking"], "--thinking goes with --prompt-type"),
        (["--prompt-type", "qwen"], "--prompt-type goes with --tokenizer"),
    ):
        assert main([*command, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(command) == 0
    assert "3 train, 3 val" in capsys.readouterr().out
