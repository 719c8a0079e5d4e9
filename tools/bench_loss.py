#!/usr/bin/env python
"""`megatron-deft bench loss` without an installed command: time and memory of the loss.

python tools/bench_loss.py --shape 512x32000
python tools/bench_loss.py --device cuda --json loss.json
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_deft.cli import main

    sys.exit(main(["bench", "loss", *sys.argv[1:]]))
