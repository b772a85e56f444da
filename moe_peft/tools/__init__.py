"""What people do with finished adapters; each tool is a file."""

from __future__ import annotations

from .expert_lora_files import export_expert_lora, export_per_expert, import_expert_lora
from .merge_for_task import merge_for_task
from .prototypes import fit_centroids, fit_directions

__all__ = [
    "export_expert_lora",
    "export_per_expert",
    "fit_centroids",
    "fit_directions",
    "import_expert_lora",
    "merge_for_task",
]
