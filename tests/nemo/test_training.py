"""NeMo's own training loop minimises the objective: gradients against the float64 formulas."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_deft.errors import UserError
from megatron_deft.integrations.nemo import deft_finetune_recipe
from tests.nemo.conftest import REASON, has_nemo

pytestmark = pytest.mark.skipif(not has_nemo(), reason=REASON)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.nemo.training import write_data

    return write_data(tmp_path_factory.mktemp("nemo") / "data")


@pytest.mark.parametrize(
    ("spec", "reduction"),
    [
        ("DEFT", "token"),
        ("dft", "token"),
        ("nll", "token"),
        ("OnlyTopP-0.1", "token"),  # drops tokens, which leave the mean
        ("Cayley_Trans", "token"),  # takes a mean of p, over the trained labels alone
        ("dft", "micro_batch"),
    ],
)
def test_gradient(spec: str, reduction: str, data: Path, tokenizer: Path, tmp_path: Path) -> None:
    from tests.nemo.training import train_and_check

    train_and_check(spec, reduction, str(data), str(tokenizer), str(tmp_path))


@pytest.mark.parametrize("reduction", ["token", "micro_batch"])
def test_gradient_of_two_ranks(reduction: str, data: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Micro-batches and ranks have different numbers of tokens."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    arguments = ["OnlyTopP-0.1", reduction, str(data), str(tokenizer), str(tmp_path)]
    result = subprocess.run(
        [*command, "--nproc-per-node=2", "-m", "tests.nemo.training", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]


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
