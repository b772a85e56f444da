"""Runs a script of train/ with what accelerate would refuse, or do otherwise, on processes without a GPU.

accelerate launch tests/processes/on_cpu.py train/sft.py --config RUN
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from tests.processes.sft_script import allow_fsdp_on_cpu, allow_tensor_parallelism_on_cpu

if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    allow_tensor_parallelism_on_cpu()
    script = Path(sys.argv[1]).resolve()
    sys.argv = [str(script), *sys.argv[2:]]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
