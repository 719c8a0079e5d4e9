"""Recipes for NeMo 2 (nemo-run) that train with an objective.

    from megatron_deft.integrations.nemo import deft_finetune_recipe

    recipe = deft_finetune_recipe("llama-3.1-8b", objective="deft", dataset="medical")
    recipe.trainer.devices = 4
    run.run(recipe, executor=run.LocalExecutor(ntasks_per_node=4, launcher="torchrun"))

On the command line, where quotes keep the shell away:

    nemo llm finetune --factory "deft(model=llama-3.1-8b, dataset=medical)" optim.config.lr=1e-5

Keep recipes with nemo-run's ZlibJSONSerializer. What `--to-yaml`, `--to-json` and `--to-toml` write
is to look at: nemo-run 0.11.1 reads no list of configs back, such as the callbacks in every recipe,
NeMo's own among them.

Importing this module does not import NeMo; making a recipe does.
"""

from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_deft.errors import UserError
from megatron_deft.integrations.nemo_checkpoint import INSTALL
from megatron_deft.integrations.nemo_settings import (
    DATASET_KWARGS,
    MODELS,
    Settings,
    find_model,
    find_settings,
)
from megatron_deft.objectives import parse
from megatron_deft.published import MODELS as HUB

if TYPE_CHECKING:
    import nemo_run as run

RECIPES = "nemo.collections.llm.recipes"


def deft_finetune_recipe(
    model: "str | run.Partial | Callable[[], run.Partial]",
    objective: str = "deft",
    dataset: str | None = None,
    *,
    reduction: str = "token",
    vocab_size: int | None = None,
    data_dir: str | None = None,
    dir: str | None = None,
    name: str | None = None,
    num_nodes: int = 1,
    num_gpus_per_node: int = 8,
) -> "run.Partial":
    """A recipe for nemo.collections.llm.finetune that trains with `objective`.

    model:      one of MODELS, with the settings published for it; or any NeMo recipe for
                llm.finetune, pretrain or train, as a run.Partial or a function that makes one,
                which keeps its own settings and is not changed itself
    objective:  a spec such as "deft" (see `objectives.OBJECTIVES`)
    dataset:    math (default), medical or figfont, whose settings are taken
    reduction:  "token" or "micro_batch" (see ObjectiveCallback)
    vocab_size: real vocabulary entries. None: the model config's, or else the tokenizer's
    data_dir:   folder with training.jsonl and validation.jsonl, as `megatron-deft prepare nemo`
                writes them: "input" is the whole prompt as the model shall see it, "output" the
                answer with its end of turn. None: data/nemo/DATASET
    dir, name, num_nodes, num_gpus_per_node: as in NeMo's recipes; name is by default
                MODEL_DATASET_OBJECTIVE

    The parameters start from nemo://HUB_NAME, which `llm.import_ckpt` or `megatron-deft convert
    export --format nemo` writes; all are trained, in bf16 with fp32 master weights.
    Three things are NeMo's and not the releases': the learning rate starts at lr / (warm-up + 1)
    and is 0 only after the last step; weight decay leaves biases and norms alone; and the steps
    are those of one epoch of the published data, 264, 91 and 156 (recipe.trainer.max_steps).
    Errors: UserError without NeMo, and for names that are not published.
    """
    _require()
    parse(objective)
    if not isinstance(model, str):
        given = {"dataset": dataset, "data_dir": data_dir, "dir": dir, "name": name}
        _refuse(given)
        recipe = deepcopy(model() if _is_function(model) else model)
    else:
        key, dataset = find_model(model), dataset or "math"
        settings = find_settings(key, dataset)
        name = name or f"{key}_{dataset}_{objective}"
        recipe = _base(key, dir, name, num_nodes, num_gpus_per_node)
        _apply(recipe, settings, data_dir or f"data/nemo/{dataset}")
    return with_objective(recipe, objective, reduction=reduction, vocab_size=vocab_size)


def with_objective(
    recipe: "run.Partial",
    objective: str,
    *,
    reduction: str = "token",
    vocab_size: int | None = None,
) -> "run.Partial":
    """Put the objective into `recipe` itself, in place of one that it has, and return it."""
    _require()
    import fiddle
    import nemo_run as run

    from megatron_deft.integrations.nemo_objective import ObjectiveCallback, check_reduction

    check_reduction(reduction)
    _check_recipe(recipe)
    recipe.model.config.calculate_per_token_loss = reduction == "token"
    ddp = getattr(recipe.trainer.strategy, "ddp", None)
    if reduction == "token" and isinstance(ddp, fiddle.Buildable):
        ddp.average_in_collective = False  # megatron-core refuses the two together
    others = [
        callback
        for callback in getattr(recipe.trainer, "callbacks", None) or []
        if getattr(callback, "__fn_or_cls__", None) is not ObjectiveCallback
    ]
    own = run.Config(
        ObjectiveCallback, objective=objective, reduction=reduction, vocab_size=vocab_size
    )
    recipe.trainer.callbacks = [own, *others]  # first, so that its place is known: callbacks[0]
    return recipe


def _require() -> None:
    try:
        import nemo_run  # noqa: F401
        from nemo.collections import llm  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"recipes need NeMo 2 and nemo-run, which cannot be imported ({error}): {INSTALL} "
            "nvidia-resiliency-ext in an environment of its own"
        ) from None


def _refuse(given: dict[str, Any]) -> None:
    wrong = [f"{name}={value}" for name, value in given.items() if value is not None]
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: a recipe that is given keeps its own settings; set them in it, "
            f"or name a model: {', '.join(MODELS)}"
        )


def _is_function(model: Any) -> bool:
    import fiddle

    return callable(model) and not isinstance(model, fiddle.Buildable)


def _check_recipe(recipe: Any) -> None:
    import fiddle

    parts = ("model.config", "trainer.strategy")
    if not isinstance(recipe, fiddle.Partial):
        raise UserError(
            f"expected a NeMo recipe, a run.Partial, got {type(recipe).__name__}; its models by "
            f"name are {', '.join(MODELS)}"
        )
    for part in parts:
        found = recipe
        for name in part.split("."):
            found = getattr(found, name, None)
        if not isinstance(found, fiddle.Buildable):
            raise UserError(
                f"the recipe's {part} is {found!r}: expected a run.Config, where the reduction of "
                "the loss can be set"
            )


def _base(key: str, dir: str | None, name: str, nodes: int, devices: int) -> Any:
    """NeMo's own recipe for full fine-tuning."""
    import nemo_run as run
    from nemo.collections import llm
    from nemo.collections.llm.recipes.finetune_default import default_finetune_recipe, nemo_resume

    base, hub = MODELS[key], HUB[key]
    if base.recipe is None:
        config = run.Config(llm.LlamaConfig)
        recipe = default_finetune_recipe(
            run.Config(llm.LlamaModel, config=config), hub, dir, name, nodes, devices
        )
        recipe.trainer.strategy.tensor_model_parallel_size = 2  # as NeMo has for its 7B models
    else:
        make = import_module(f"{RECIPES}.{base.recipe}").finetune_recipe
        recipe = make(
            dir=dir, name=name, num_nodes=nodes, num_gpus_per_node=devices, peft_scheme=None
        )
        recipe.resume = nemo_resume(hub)
    # NeMo's default, and it cannot: it imports megatron-core's tensorstore, which 0.16 has no more
    recipe.trainer.strategy.ckpt_async_save = False
    for field, value in base.config.items():
        setattr(recipe.model.config, field, value)
    return recipe


def _apply(recipe: Any, settings: Settings, data_dir: str) -> None:
    import nemo_run as run
    from nemo.collections.llm import FineTuningDataModule
    from nemo.collections.llm.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing

    recipe.model.config.seq_length = settings.max_length
    recipe.data = run.Config(
        FineTuningDataModule,
        dataset_root=data_dir,
        seq_length=settings.max_length,
        micro_batch_size=settings.micro_batch,
        global_batch_size=settings.global_batch,
        dataset_kwargs=dict(DATASET_KWARGS),
    )
    recipe.optim = distributed_fused_adam_with_cosine_annealing(
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        warmup_steps=settings.warmup_steps,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        clip_grad=settings.clip_grad,
    )
    recipe.optim.config.adam_eps = 1e-8  # of the releases' AdamW
    recipe.optim.config.weight_decay = settings.weight_decay
    recipe.trainer.max_steps = settings.steps
    # validated and kept at the end, which is what is published
    recipe.trainer.val_check_interval = settings.steps
    # of all steps: Lightning refuses an interval longer than what is left when a run is resumed
    recipe.trainer.check_val_every_n_epoch = None
    recipe.log.ckpt.every_n_train_steps = settings.steps
