"""`python -m megatron_deft` is `megatron-deft`."""

import sys

from megatron_deft.cli import main

if __name__ == "__main__":
    sys.exit(main())
