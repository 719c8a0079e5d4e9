"""NeMo's own training loop minimises the objective: gradients against the float64 formulas."""

from pathlib import Path
from typing import Any

import pytest

from megatron_deft.errors import UserError
from megatron_deft.integrations.nemo import deft_finetune_recipe
from tests.nemo.conftest import REASON, has_nemo

pytestmark = pytest.mark.skipif(not has_nemo(), reason=REASON)


@pytest.fixture
def base(data: Path, tokenizer: Path, tmp_path: Path) -> Any:
    from tests.nemo.training import tiny_recipe

    return tiny_recipe(data, tokenizer, tmp_path / "logs")


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
def test_gradient_and_metrics(spec: str, reduction: str, base: Any) -> None:
    from tests.nemo.training import train_and_check

    train_and_check(base, spec, reduction)


def test_adapters(base: Any) -> None:
    """LoRA: what is trained has the objective's gradients, and nothing else is trained."""
    import nemo_run as run
    from nemo.collections import llm

    from tests.nemo.training import train_and_check

    # not zero as usual, which would leave the other factor without a gradient
    base.peft = run.Config(llm.peft.LoRA, dim=4, alpha=8, lora_B_init_method="xavier")
    witness = train_and_check(base, "DEFT")
    names = witness.steps[0].found.keys()
    assert len(names) == 2 * 2 * 4  # factors, layers, matrices
    assert all(".adapter." in name for name in names)


def test_refuses_what_would_reduce_otherwise(base: Any) -> None:
    from tests.nemo.training import finetune

    recipe = deft_finetune_recipe(base, "deft")
    recipe.model.config.calculate_per_token_loss = False
    with pytest.raises(UserError, match="calculate_per_token_loss=True"):
        finetune(recipe)
    recipe = deft_finetune_recipe(base, "deft")
    recipe.trainer.strategy.ddp.average_in_collective = True
    with pytest.raises(UserError, match="average_in_collective=False"):
        finetune(recipe)


def test_refuses_what_cannot_be_saved(base: Any) -> None:
    """NeMo's default would end in "megatron-core was not found" after the first step."""
    from tests.nemo.training import finetune

    recipe = deft_finetune_recipe(base, "deft")
    recipe.trainer.strategy.ckpt_async_save = True
    with pytest.raises(UserError, match="ckpt_async_save=False"):
        finetune(recipe)


def everything(*arguments: Any) -> bool:
    return True


@pytest.mark.parametrize(
    ("name", "value"), [("lr_mult", 2.0), ("no_weight_decay_cond", everything)]
)
def test_refuses_what_the_optimizer_no_longer_has(name: str, value: Any, base: Any) -> None:
    from tests.nemo.training import finetune

    recipe = deft_finetune_recipe(base, "deft")
    setattr(recipe.optim, name, value)
    with pytest.raises(UserError, match=f"^{name} of the recipe's optim: megatron-core 0.16"):
        finetune(recipe)


def test_the_optimizer_is_mended_once() -> None:
    from megatron.core import optimizer

    from megatron_deft.integrations.nemo_optimizer import mend_optimizer

    mend_optimizer()
    mended = optimizer.get_megatron_optimizer
    mend_optimizer()
    assert optimizer.get_megatron_optimizer is mended
