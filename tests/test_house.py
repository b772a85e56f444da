"""The package seen from outside: its public names, and what importing it brings along."""

from __future__ import annotations

import subprocess
import sys

import moe_peft


def test_dir_shows_the_public_names_only():
    assert dir(moe_peft) == sorted([*moe_peft.__all__, "__version__"])
    assert all(getattr(moe_peft, name) is not None for name in dir(moe_peft))


def test_importing_the_package_brings_along_neither_trainers_nor_quantizers():
    code = (
        "import sys, peft\n"
        "before = set(sys.modules)\n"
        "import moe_peft\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = new & {'trl', 'datasets', 'matplotlib', 'bitsandbytes', 'triton'}\n"
        "assert not heavy, heavy\n"
        "assert not any('quantizer' in name for name in set(sys.modules) - before)\n"
        "assert 'moe_peft.quantization.loading' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
