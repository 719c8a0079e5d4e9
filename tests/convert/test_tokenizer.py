"""A folder without a tokenizer, and a tokenizer whose files are damaged."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_deft.convert.hf import export_hf, import_hf
from megatron_deft.convert.tokenizer import check_vocabulary
from megatron_deft.data.tiny import make_tiny_llama
from megatron_deft.errors import UserError
from tests.convert.tiny_models import CONFIGS, make


def test_a_folder_without_a_tokenizer_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make(tmp_path / "hf", CONFIGS["llama_gqa_tied"])
    weights = import_hf(source, tmp_path / "weights", verify=False)
    export_hf(weights, tmp_path / "out", verify=False)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    lacks = "has no tokenizer (tokenizer.json or tokenizer.model or vocab.json): training on texts"
    assert [lacks in message for message in warned] == [True, True]
    assert warned[0].startswith(f"{source} ")
    assert warned[0].endswith("put the model's tokenizer files there and import again")
    assert warned[1].startswith(f"{weights / 'hf'} ")
    assert warned[1].endswith(f"put the model's tokenizer files into {tmp_path / 'out'}")


def test_a_folder_with_one_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_tiny_llama(tmp_path / "hf", ["a cat sat"], layers=1, hidden_size=16)
    export_hf(import_hf(source, tmp_path / "weights", verify=False), tmp_path / "out", verify=False)
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    "added",
    [{"1": {}}, {"1": {"content": None}}, {"1": {"content": 2}}, {"x": {"content": "a"}},
     {"-1": {"content": "a"}}, {"1": "a"}, {"1": None}, ["a"], "a", 1],
)  # fmt: skip
def test_added_tokens_of_another_form_are_one_line(added: Any, tmp_path: Path) -> None:
    source = make_tiny_llama(tmp_path / "hf", ["a cat sat"], layers=1, hidden_size=16)
    path = source / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "added_tokens_decoder": added}))
    with pytest.raises(UserError, match=r"added_tokens_decoder is not a content for each number"):
        check_vocabulary(source, 512)
