"""What the fork server imports before it forks ranks (see distributed.py)."""

import gc
import importlib
import queue
import warnings

from megatron_deft.platform import import_megatron

warnings.filterwarnings("ignore", category=FutureWarning)
import_megatron()
for name in (
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron_deft.training.trainer",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
):
    importlib.import_module(name)

# megatron-core keeps the results of a save in a process of their own, which each rank would start
# anew and which imports torch anew. For a save that is waited for, a queue in the rank does; the
# commands of the README and the quickstart, run as they are, have megatron-core's.
filesystem = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
assert filesystem._results_queue is None
filesystem._results_queue = queue.Queue()

# What is here now stays for ever: no rank need look through it for garbage, which would also copy
# every page of it.
gc.collect()
gc.freeze()
