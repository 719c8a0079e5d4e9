"""What the fork server imports before it forks ranks (see distributed.py)."""

import warnings

from megatron_deft.platform import import_megatron

warnings.filterwarnings("ignore", category=FutureWarning)
import_megatron()
