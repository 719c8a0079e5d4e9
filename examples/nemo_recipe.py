"""A NeMo 2 recipe with an objective: print it, change it, run it.

    python examples/nemo_recipe.py                       # prints the recipe, needs no GPU
    python examples/nemo_recipe.py --run --gpus 2        # trains it here, with torchrun

Needs, in an environment of its own: NeMo 2 and nemo-run (`megatron_deft.integrations.nemo` says
which), the weights as nemo://Qwen/Qwen2.5-Math-1.5B, and the data/nemo/math that
`megatron-deft prepare nemo` writes.
"""

import argparse

import nemo_run as run

from megatron_deft.integrations.nemo import deft_finetune_recipe


def main() -> None:
    """Make the recipe of the arguments, and print or run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen-2.5-math-1.5b")
    parser.add_argument("--dataset", default="math", help="math, medical or figfont")
    parser.add_argument("--objective", default="deft", help="see megatron-deft objectives")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--run", action="store_true", help="train; default: print the recipe")
    arguments = parser.parse_args()

    recipe = deft_finetune_recipe(
        arguments.model, arguments.objective, arguments.dataset, num_gpus_per_node=arguments.gpus
    )
    recipe.trainer.log_every_n_steps = 1  # any of NeMo's settings can be changed
    if arguments.run:
        executor = run.LocalExecutor(ntasks_per_node=arguments.gpus, launcher="torchrun")
        run.run(recipe, executor=executor)
    else:
        print(recipe)


if __name__ == "__main__":
    main()
