"""The model card: front matter that the Hub's own parser reads, and what the run recorded."""

import logging
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from megatron_deft.convert.card import model_card, read_license
from megatron_deft.convert.hf import export_hf, import_hf
from megatron_deft.revision import revision
from tests.convert.tiny_models import CONFIGS, make

RUN: dict[str, Any] = {
    "kind": "training",
    "spec": {"family": "qwen2"},
    "step": 20,
    "consumed": 640,
    "tokens": 12345,
    "objective": "deft(eps=1e-06)",
    "base": "a/b",
    "license": {"license": "other", "license_name": "ours: 2", "license_link": "LICENSE"},
    "revision": "0.1.0 (0123456789ab)",
    "config": {
        "reduction": "token",
        "data": {"train_files": ["/home/me/math/train.parquet", "more.jsonl"], "val_files": []},
    },
}


def parsed(text: str, folder: Path) -> ModelCard:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return ModelCard.load(folder / "README.md")


def test_card_of_a_run(tmp_path: Path) -> None:
    card = parsed(model_card(RUN), tmp_path)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **RUN["license"],
        "base_model": "a/b",
        "base_model_relation": "finetune",
        "tags": ["megatron_deft", "deft"],
    }
    assert [line for line in card.text.splitlines() if line.startswith("- ")] == [
        "- Family: qwen2",
        "- Base model: a/b",
        "- Objective: deft(eps=1e-06)",
        "- Reduction: token",
        "- Training data: math/train.parquet, more.jsonl",
        "- Optimizer steps: 20",
        "- Samples seen: 640",
        "- Tokens seen: 12345 (prompts and responses)",
        "- Trained by: megatron_deft 0.1.0 (0123456789ab)",
        f"- Exported by: megatron_deft {revision()}",
    ]


def test_card_of_a_run_that_recorded_less(tmp_path: Path) -> None:
    """As the first versions wrote it, of a base without a name on the Hub."""
    old = {key: RUN[key] for key in ("kind", "spec", "step", "objective")} | {"base": "folder: 1"}
    card = parsed(model_card(old), tmp_path)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "- Base model: folder: 1" in card.text
    assert "None" not in card.text


BASE_CARD = """---
language: en
license: other
license_name: tiny-license
license_link: https://example.org/license
datasets: [secret/one]
extra_gated_prompt: "--- agree ---"
---
# The best model

---
license: mit
"""


def test_the_licence_of_the_base_is_carried_and_nothing_else(tmp_path: Path) -> None:
    source = make(tmp_path / "hf", CONFIGS["llama_gqa_tied"])
    (source / "README.md").write_text(BASE_CARD)
    weights = import_hf(source, tmp_path / "weights", verify=False)
    again = export_hf(weights, tmp_path / "again", verify=False)
    card = ModelCard.load(again / "README.md")
    assert card.data.license == "other"
    assert card.data.license_name == "tiny-license"
    assert card.data.license_link == "https://example.org/license"
    assert not {"language", "datasets", "base_model"} & set(card.data.to_dict())
    assert "best" not in card.content
    assert not (weights / "hf" / "README.md").exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# No front matter\nlicense: mit\n", {}),
        ("---\nlicense: [mit, apache-2.0]\r\n---\n", {"license": ["mit", "apache-2.0"]}),
        ("---\r\nlicense: llama3\r\n---\r\ntext", {"license": "llama3"}),
        ("---\n- a list\n---\n", {}),
        ("---\nlicense: 2\n---\n", {}),
        ("---\nlicense: mit\n", {}),
    ],
)
def test_licence_in_front_matter(tmp_path: Path, text: str, found: dict[str, Any]) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert read_license(tmp_path) == found


def test_front_matter_that_is_no_yaml_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    with caplog.at_level(logging.WARNING):
        assert read_license(tmp_path) == {}
    assert "README.md: its front matter is not YAML" in caplog.text
    assert read_license(tmp_path / "nowhere") == {}
