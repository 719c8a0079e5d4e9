#!/usr/bin/env python
"""`megatron-deft convert` without an installed command: import, export or verify a checkpoint.

python tools/convert_checkpoint.py import HF_FOLDER WEIGHTS
python tools/convert_checkpoint.py export CHECKPOINT HF_FOLDER --dtype bf16
python tools/convert_checkpoint.py verify HF_FOLDER CHECKPOINT
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_deft.cli import main

    sys.exit(main(["convert", *sys.argv[1:]]))
