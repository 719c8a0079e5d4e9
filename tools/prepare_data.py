#!/usr/bin/env python
"""`megatron-deft prepare` without an installed command: make a data set, or tokenise files.

python tools/prepare_data.py figfont data/figfont
python tools/prepare_data.py chat data/chat train.jsonl --tokenizer HF_FOLDER --max-length 2048
python tools/prepare_data.py pretrain data/corpus corpus.parquet --tokenizer HF_FOLDER
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_deft.cli import main

    sys.exit(main(["prepare", *sys.argv[1:]]))
