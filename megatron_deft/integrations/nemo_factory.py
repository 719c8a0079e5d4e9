"""The recipes on nemo-run's command line; importing this imports NeMo.

nemo-run finds it by the entry point of the group nemo_run.cli. The arguments are plain types
alone, which is what its command line can read.
"""

import nemo_run as run
from nemo.collections import llm

from megatron_deft.integrations.nemo import deft_finetune_recipe


@run.cli.factory(target=llm.finetune, name="deft")
def deft(
    model: str,
    objective: str = "deft",
    dataset: str = "math",
    reduction: str = "token",
    data_dir: str | None = None,
    dir: str | None = None,
    name: str | None = None,
    num_nodes: int = 1,
    num_gpus_per_node: int = 8,
) -> run.Partial:
    """deft_finetune_recipe of a model by its name."""
    return deft_finetune_recipe(
        model,
        objective,
        dataset,
        reduction=reduction,
        data_dir=data_dir,
        dir=dir,
        name=name,
        num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node,
    )
