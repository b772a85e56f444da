"""What people do with finished adapters; each tool is a file."""

from __future__ import annotations

from .expert_lora_files import export_expert_lora, export_per_expert, import_expert_lora

__all__ = ["export_expert_lora", "export_per_expert", "import_expert_lora"]
