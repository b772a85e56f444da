"""`python -m moe_peft`: the command `moe-peft`, where no script of that name is on the path."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
