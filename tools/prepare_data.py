#!/usr/bin/env python
"""`megatron-deft prepare` without an installed command: make the files of a data set.

python tools/prepare_data.py math data/math
python tools/prepare_data.py medical data/medical --source m23k/train.parquet
python tools/prepare_data.py figfont data/figfont
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_deft.cli import main

    sys.exit(main(["prepare", *sys.argv[1:]]))
