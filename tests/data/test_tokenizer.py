"""A tokenizer's hash is that of its ids; a copy of its files is the same tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers, processors
from transformers import AutoTokenizer

from megatron_deft.data.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    template_hash,
    template_text,
    tokenizer_hash,
    vocab_size,
)
from megatron_deft.errors import UserError
from tests.data.conftest import CHATML, PLAIN


def fresh(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def truncate(tokenizer: Any) -> None:
    tokenizer(["a b c", "d"], truncation=True, max_length=2, padding=True)
    assert tokenizer.backend_tokenizer.truncation is not None


def add_bos(tokenizer: Any) -> None:
    specials = [("<|endoftext|>", 0)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=specials
    )


def set_pad(tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token


def no_change(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN


@pytest.mark.parametrize("change", [truncate, add_bos, set_pad, no_change])
def test_what_changes_no_id_changes_no_hash(
    tiny_folder: Path, tokenizer: Any, change: Callable[[Any], None]
) -> None:
    other = fresh(tiny_folder)
    change(other)
    assert tokenizer_hash(other) == tokenizer_hash(tokenizer)


def add_token(tokenizer: Any) -> None:
    tokenizer.add_tokens(["ART"])


def add_special(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})


def other_eos(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|im_start|>"


def normalise(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()


@pytest.mark.parametrize("change", [add_token, add_special, other_eos, normalise])
def test_what_changes_ids_changes_the_hash(
    tiny_folder: Path, tokenizer: Any, change: Callable[[Any], None]
) -> None:
    other = fresh(tiny_folder)
    change(other)
    assert tokenizer_hash(other) != tokenizer_hash(tokenizer)


def test_a_merge_more_or_less_changes_the_hash(
    tmp_path: Path, tiny_folder: Path, tokenizer: Any
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    rules = json.loads(path.read_text())
    first, second, *rest = rules["model"]["merges"]
    rules["model"]["merges"] = [second, first, *rest]
    path.write_text(json.dumps(rules))
    assert tokenizer_hash(fresh(tmp_path / "hf")) != tokenizer_hash(tokenizer)


def test_merges_as_older_files_have_them(tmp_path: Path, tiny_folder: Path, tokenizer: Any) -> None:
    shutil.copytree(tiny_folder, tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["model"]["merges"] = [" ".join(pair) for pair in rules["model"]["merges"]]
    path.write_text(json.dumps(rules))
    assert tokenizer_hash(fresh(tmp_path / "hf")) == tokenizer_hash(tokenizer)


def test_wherever_the_folder_is_and_whoever_wrote_it(
    tmp_path: Path, tiny_folder: Path, tokenizer: Any, llama3_tokenizer: Any
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "copied")
    tokenizer.save_pretrained(tmp_path / "saved")
    hashes = {tokenizer_hash(fresh(tmp_path / name)) for name in ("copied", "saved")}
    assert hashes == {tokenizer_hash(tokenizer)}
    assert tokenizer_hash(llama3_tokenizer) not in hashes


def test_a_tokenizer_without_rules_of_its_own_on_file() -> None:
    """Those written in Python have a vocabulary and nothing that could be read."""

    class Plain:
        added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012
        bos_token, eos_token = "<s>", "</s>"

        def __init__(self, *words: str) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {word: index for index, word in enumerate(self.words)}

    assert tokenizer_hash(Plain("a", "b")) == tokenizer_hash(Plain("a", "b"))
    assert tokenizer_hash(Plain("a", "b")) != tokenizer_hash(Plain("b", "a"))


def test_templates(tokenizer: Any, with_template: Callable[..., Any]) -> None:
    assert template_hash(None) is None
    assert template_text(with_template(None)) is None
    assert template_hash(CHATML) != template_hash(PLAIN)
    several = template_text(with_template({"default": CHATML, "tool_use": PLAIN}))
    assert several == template_text(with_template({"tool_use": PLAIN, "default": CHATML}))


def test_vocabulary_is_counted_to_its_highest_id(tiny_folder: Path) -> None:
    tokenizer = fresh(tiny_folder)
    before = vocab_size(tokenizer)
    tokenizer.add_tokens(["ART"])
    assert vocab_size(tokenizer) == before + 1 == len(tokenizer)


@pytest.mark.parametrize("template", ["same", None, PLAIN])
def test_a_copy_is_the_same_tokenizer(
    tmp_path: Path, tiny_folder: Path, with_template: Callable[..., Any], template: str | None
) -> None:
    own = fresh(tiny_folder).chat_template
    used = with_template(own if template == "same" else template)
    save_tokenizer(tiny_folder, used, tmp_path / "copy")
    copy = fresh(tmp_path / "copy")
    assert copy.chat_template == used.chat_template
    assert tokenizer_hash(copy) == tokenizer_hash(used)
    assert not list((tmp_path / "copy").glob("*.safetensors"))


def test_several_templates_are_copied(tmp_path: Path, with_template: Callable[..., Any]) -> None:
    several = with_template({"default": CHATML, "tool_use": PLAIN})
    several.save_pretrained(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf", several, tmp_path / "copy")
    assert template_text(fresh(tmp_path / "copy")) == template_text(several)
    save_tokenizer(tmp_path / "hf", with_template(PLAIN), tmp_path / "one")
    assert fresh(tmp_path / "one").chat_template == PLAIN


def test_no_folder_and_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is not a folder: name the model's"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)
