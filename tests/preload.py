"""What the fork server imports before it forks ranks (see distributed.py)."""

import importlib
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
