"""NeMo's own data set reads what `prepare nemo` writes as the tokens and mask of a prepared set."""

from pathlib import Path

import pytest

from megatron_deft.data.indexed import open_set
from megatron_deft.data.prepare.nemo import write_nemo
from megatron_deft.data.prepare.settings import RowSettings
from megatron_deft.data.prepare.tokenise import prepare_set
from megatron_deft.data.tokenizer import load_tokenizer
from megatron_deft.integrations.nemo import deft_finetune_recipe
from tests.data.files import write
from tests.nemo.conftest import REASON, has_nemo

pytestmark = pytest.mark.skipif(not has_nemo(), reason=REASON)
MAX_LENGTH = 48
WRITTEN = "<|im_start|>user\nwhat is {n}?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("written", [False, True], ids=["template", "written"])
def test_tokens_and_mask(written: bool, tokenizer: Path, tmp_path: Path) -> None:
    import fiddle
    import nemo_run as run
    from nemo.collections.common.tokenizers import AutoTokenizer

    # from a few tokens to more than there is room for; a special token and spaces in an answer
    answers = [f"it is {n}, of course" * n + " \u2028<|im_start|> " * (n % 2) for n in range(1, 9)]
    questions = [(WRITTEN if written else "what is {n}?").format(n=n) for n in range(8)]
    rows = [
        {"extra_info": {"question": q, "answer": a}}
        for q, a in zip(questions, answers, strict=True)
    ]
    file = write(tmp_path / "a.jsonl", rows)
    settings = RowSettings(use_original_prompt=written, max_length=MAX_LENGTH)
    files = {"training": [file], "validation": [file]}
    write_nemo(tmp_path / "nemo", files, tokenizer, settings)
    prepare_set(tmp_path / "set", [file], tokenizer, settings)

    recipe = deft_finetune_recipe("Llama-3.1-8B", data_dir=str(tmp_path / "nemo"))
    recipe.data.seq_length = MAX_LENGTH
    recipe.data.tokenizer = run.Config(AutoTokenizer, str(tokenizer))
    data = fiddle.build(recipe.data)
    theirs = data._create_dataset(data.train_path, **data.dataset_kwargs)
    loaded = load_tokenizer(tokenizer)
    ours = open_set(tmp_path / "set", loaded)
    assert len(theirs) == len(ours) == len(rows)
    ends = 0
    for index in range(len(rows)):
        batch = theirs.collate_fn([theirs[index]])
        sample = ours[index]
        n = len(sample.tokens) - 1  # predicted
        assert batch["tokens"][0, :n].tolist() == sample.tokens[:-1].tolist()
        assert batch["labels"][0, :n].tolist() == sample.tokens[1:].tolist()
        assert batch["loss_mask"][0, :n].tolist() == sample.weights[1:].tolist()
        assert not batch["loss_mask"][0, n:].any()
        trained = batch["labels"][0][batch["loss_mask"][0] > 0].tolist()
        is_cut = len(sample.tokens) == MAX_LENGTH
        assert trained.count(loaded.eos_token_id) == (not is_cut)
        ends += not is_cut
    assert 0 < ends < len(rows)
