"""One rank of a training run: `torchrun --nproc-per-node N -m megatron_deft.train CONFIG a.b=v ...`

The same as `megatron-deft train` with its arguments, which can start the ranks itself.
"""

import sys

from megatron_deft.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
