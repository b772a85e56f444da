"""4-bit experts: packed as they are loaded, read as if they were not. Registers with transformers when imported."""

from __future__ import annotations
