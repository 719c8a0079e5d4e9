"""NeMo's own training loop minimises the objective: gradients against the float64 formulas."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_deft.errors import UserError
from megatron_deft.integrations.nemo import deft_finetune_recipe
from tests.nemo.conftest import REASON, has_nemo

pytestmark = pytest.mark.skipif(not has_nemo(), reason=REASON)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.nemo.training import write_data

    return write_data(tmp_path_factory.mktemp("nemo") / "data")


def trained(
    spec: str, data: Path, tokenizer: Path, logs: Path, reduction: str = "token", **changes: Any
) -> Any:
    """The witness of a run of two steps."""
    from tests.nemo.training import VOCAB, Witness, finetune, tiny_recipe

    base = tiny_recipe(data, tokenizer, logs)
    recipe = deft_finetune_recipe(base, spec, reduction=reduction, vocab_size=VOCAB)
    witness = Witness(spec, reduction)
    finetune(recipe, witness)
    return witness


@pytest.mark.parametrize(
    ("spec", "reduction"),
    [
        ("DEFT", "token"),
        ("dft", "token"),
        ("nll", "token"),
        ("OnlyTopP-0.1", "token"),  # drops tokens, which leave the mean
        ("cayley(floor=data_parallel)", "token"),  # means over the trained labels alone
        ("dft", "micro_batch"),
    ],
)
def test_gradient(spec: str, reduction: str, data: Path, tokenizer: Path, tmp_path: Path) -> None:
    if "cayley" in spec:
        spec = "cayley(floor=0)"
    witness = trained(spec, data, tokenizer, tmp_path, reduction)
    assert len(witness.steps) == 2
    for step in witness.steps:
        assert step["reduced"] == pytest.approx(step["loss"], rel=1e-5)
        for name, found in step["found"].items():
            expected = step["oracle"][name]
            assert expected.norm() > 0, name
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max())
    assert not torch.equal(*witness.weights)  # the optimizer has made a step


def test_refuses_what_would_reduce_otherwise(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    from tests.nemo.training import finetune, tiny_recipe

    recipe = deft_finetune_recipe(tiny_recipe(data, tokenizer, tmp_path), "deft")
    recipe.model.config.calculate_per_token_loss = False
    with pytest.raises(UserError, match="calculate_per_token_loss=True"):
        finetune(recipe)
    recipe = deft_finetune_recipe(tiny_recipe(data, tokenizer, tmp_path), "deft")
    recipe.trainer.strategy.ddp.average_in_collective = True
    with pytest.raises(UserError, match="average_in_collective=False"):
        finetune(recipe)
