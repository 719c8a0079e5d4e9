#!/usr/bin/env python
"""A published experiment as one bash script: prepare, import, train, export, evaluate.

python tools/one_click.py --dataset math --model_save_name qwen-2.5-math-1.5b \
    --trainer_objective_trans DEFT --nproc_per_node 2 --cuda_visible_devices 0,1 --run_script
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_deft.one_click.command import main

    sys.exit(main())
