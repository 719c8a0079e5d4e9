"""The example configurations read what `prepare` writes: their columns are there, and train."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_deft.config import load_config
from megatron_deft.data.chat import encode, render_columns
from megatron_deft.data.prepare.math import prepare_math
from megatron_deft.data.prepare.medical import prepare_medical
from megatron_deft.data.tiny import make_tiny_llama
from tests.data.prepare.conftest import M23K_ROWS, NUMINA_ROWS, QUIET, read, write_jsonl

EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "configs").glob("*_*.yaml"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/ as the configurations name it, of a few rows, and a tokenizer."""
    from megatron_deft.data.prepare.figfont import prepare_figfont

    folder = tmp_path_factory.mktemp("examples")
    numina = write_jsonl(folder / "numina.jsonl", NUMINA_ROWS)
    m23k = write_jsonl(folder / "m23k.jsonl", M23K_ROWS)
    prepare_math(folder / "data" / "math", [str(numina)], choice=QUIET)
    prepare_medical(folder / "data" / "medical", [str(m23k)], QUIET)
    if any(path.stem.startswith("figfont") for path in EXAMPLES):
        pytest.importorskip("reasoning_gym", reason="pip install 'megatron-deft[figfont]'")
        prepare_figfont(folder / "data" / "figfont", 3, 2, progress=False)
    make_tiny_llama(folder / "hf", [numina.read_text(), m23k.read_text()], vocab_size=400)
    return folder


def value(row: dict[str, Any], key: str, names: tuple[str, ...]) -> str:
    found = row[key]
    for name in names:
        found = found[name]
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_reads_what_prepare_writes(
    path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    cfg = load_config(path).data
    tokenizer = AutoTokenizer.from_pretrained(root / "hf")
    for file in (*cfg.train_files, *cfg.val_files):
        for row in read(Path(file).parent, Path(file).stem):
            prompt = value(row, cfg.prompt_key, cfg.prompt_dict_keys)
            answer = value(row, cfg.response_key, cfg.response_dict_keys)
            rendered = render_columns(tokenizer, prompt, answer, cfg.use_original_prompt)
            (sample,) = encode(tokenizer, [rendered])
            trained, before = sample.weights > 0, sample.weights == 0
            assert tokenizer.decode(sample.tokens[trained].tolist()) == answer + tokenizer.eos_token
            seen = tokenizer.decode(sample.tokens[before].tolist())
            assert seen == prompt if cfg.use_original_prompt else prompt in seen
