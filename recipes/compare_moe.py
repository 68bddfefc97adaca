"""compare_moe: every MoE backend and a dense model of equal active FLOPs, trained on the same batches.

    python recipes/compare_moe.py --max_steps 50
    deepspeed --num_accelerators 2 recipes/compare_moe.py --max_steps 50 --moe.ep_size 2

Takes the settings of ``lm_16l`` and the flags of ``moe-scale compare``, which this is with its recipe filled in.
"""

import sys
from pathlib import Path

from moe_scale.cli import main

if __name__ == "__main__":
    main(["compare", str(Path(__file__).with_name("lm_16l.py")), *sys.argv[1:]])
