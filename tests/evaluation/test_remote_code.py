"""No code that comes with a model is run, and none is asked for on the terminal."""

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import megatron_deft
from megatron_deft.convert import tokens
from megatron_deft.data import tokenizer
from megatron_deft.errors import UserError
from megatron_deft.evaluation import folder
from megatron_deft.evaluation.engines import load_model
from megatron_deft.evaluation.folder import check_attention

LOADERS = ("from_pretrained", "from_config", "LLM", "HFLM", "load_dataset", "pipeline")


def calls() -> list[tuple[str, ast.Call]]:
    found = []
    for path in Path(megatron_deft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                found.append((name, node))
    return found


def test_every_load_says_no_and_no_shell_is_started() -> None:
    loads = 0
    for name, call in calls():
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert keywords.get("shell", "False") == "False", ast.unparse(call)
        assert name not in ("getoutput", "getstatusoutput", "popen"), ast.unparse(call)
        assert ast.unparse(call.func) not in ("eval", "exec"), ast.unparse(call)
        assert not ast.unparse(call.func).startswith("os.system"), ast.unparse(call)
        assert keywords.get("trust_remote_code", "False") == "False", ast.unparse(call)
        assert keywords.get("weights_only", "True") == "True", ast.unparse(call)
        if name in LOADERS and name != "load_dataset":  # which knows no code any more
            loads += 1
            assert "trust_remote_code" in keywords, ast.unparse(call)
        if ast.unparse(call.func) == "torch.load":
            assert "weights_only" in keywords, ast.unparse(call)
    assert loads >= 8


@pytest.mark.parametrize(
    "load",
    [tokenizer.load_tokenizer, tokens.load_tokenizer, folder.load_tokenizer,
     lambda path: load_model(path, "fp32")],
)  # fmt: skip
def test_code_beside_a_model_is_refused(
    base: Path, tmp_path: Path, load: Callable[[Any], Any]
) -> None:
    model, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(base / "hf", model)
    (model / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    for file, name, entry in (
        ("config.json", "AutoConfig", "evil.Config"),
        ("tokenizer_config.json", "AutoTokenizer", ["evil.Tokenizer", None]),
    ):
        config = json.loads((model / file).read_text())
        config |= {"auto_map": {name: entry}, "model_type": "evil", "tokenizer_class": "Evil"}
        (model / file).write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        load(model)
    assert "\n" not in str(caught.value)
    assert "custom code" in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_from_the_hub_is_refused(base: Path, tmp_path: Path, key: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(base / "hf", model)
    config = json.loads((model / "config.json").read_text())
    for name in ("sdpa", "evil-org/evil-kernel"):
        (model / "config.json").write_text(json.dumps({**config, key: name}))
        if name == "sdpa":
            load_model(model, "fp32")
            continue
        with pytest.raises(UserError) as caught:
            load_model(model, "fp32")
        assert "asks for the attention implementation evil-org/evil-kernel" in str(caught.value)


def test_attention_of_a_part_is_looked_at() -> None:
    part = SimpleNamespace(_attn_implementation="evil-org/evil-kernel")
    whole = SimpleNamespace(_attn_implementation=None, text_config=part)
    with pytest.raises(UserError, match="evil-org/evil-kernel"):
        check_attention(Path("model"), whole)
