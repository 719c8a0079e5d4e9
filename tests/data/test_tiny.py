"""The tiny model loads as any Llama does, and its tokenizer keeps every byte."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from megatron_deft.data.tiny import make_tiny_llama
from megatron_deft.errors import UserError
from tests.data.conftest import ART, TEXTS


def test_it_loads_and_runs(tiny_folder: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": ART}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"]
    assert model(ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)
    assert model.config.vocab_size == len(tokenizer)
    assert model.dtype == torch.float32
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 0, 2)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert sum(path.stat().st_size for path in tiny_folder.iterdir()) < 4e6


def test_both_spellings_of_rope_are_written(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    tokenizer_config = json.loads((tiny_folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"


@settings(max_examples=300)
@given(text=st.text(max_size=60) | st.text(st.sampled_from(list(" \n\t|_/\\.,'")), max_size=60))
def test_decode_is_the_inverse_of_encode(tokenizer: Any, text: str) -> None:
    if any(special in text for special in tokenizer.all_special_tokens):
        return
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_art_takes_fewer_tokens_than_bytes(tokenizer: Any) -> None:
    ids = tokenizer(ART)["input_ids"]
    assert tokenizer.decode(ids) == ART
    assert len(ids) <= len(ART) / 2 + 1


def test_markers_are_single_tokens(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert [token for token in ids if token < 3] == [1, 2, 1, 2]
    turns = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n"
    assert tokenizer.decode(ids) == turns


SCRIPT = """
import sys
from megatron_deft.data.tiny import make_tiny_llama
from tests.data.conftest import TEXTS
make_tiny_llama(sys.argv[1], iter(TEXTS), vocab_size=400)
"""


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_another_process_makes_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "again"], check=True, env=environment)
    assert digests(tmp_path / "again") == digests(tiny_folder)


def test_seed_and_shape_are_honoured(tmp_path: Path, tiny_folder: Path) -> None:
    before = torch.random.get_rng_state()
    folder = make_tiny_llama(
        tmp_path / "m", TEXTS, vocab_size=300, hidden_size=48, layers=1, heads=6, kv_heads=3,
        seed=5, tied_embeddings=True, ffn_hidden_size=80,
    )  # fmt: skip
    assert torch.equal(before, torch.random.get_rng_state())
    model = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[0]
    assert layer.self_attn.k_proj.weight.shape == (24, 48)
    assert layer.mlp.up_proj.weight.shape == (80, 48)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == 300
    other = make_tiny_llama(tmp_path / "n", TEXTS, vocab_size=400, seed=5)
    assert digests(other)["tokenizer.json"] == digests(tiny_folder)["tokenizer.json"]
    assert digests(other)["model.safetensors"] != digests(tiny_folder)["model.safetensors"]


def test_impossible_sizes_and_an_existing_folder_are_refused(tmp_path: Path) -> None:
    for sizes, message in (
        ({"vocab_size": 258}, "vocab_size=258: at least 259"),
        ({"hidden_size": 20, "heads": 8}, "hidden_size=20"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3: must divide heads=4"),
    ):
        with pytest.raises(UserError, match=message):
            make_tiny_llama(tmp_path / "m", TEXTS, **sizes)  # type: ignore[arg-type]
    assert not (tmp_path / "m").exists()
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match="exists already"):
        make_tiny_llama(tmp_path / "m", TEXTS)
