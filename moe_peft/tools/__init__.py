"""What people do with finished adapters; each tool is a file."""

from __future__ import annotations

from .esft_files import export_esft, import_esft
from .expert_lora_files import export_expert_lora, export_per_expert, import_expert_lora
from .export_lora import export_lora
from .export_merged import export_merged
from .merge_for_task import merge_for_task
from .prototypes import fit_centroids, fit_directions
from .report import RoutingReport, make_batches, read_texts, routing_report
from .similarity import delta_similarity
from .without_base import load_without_base

__all__ = [
    "RoutingReport",
    "delta_similarity",
    "export_esft",
    "export_expert_lora",
    "export_lora",
    "export_merged",
    "export_per_expert",
    "fit_centroids",
    "fit_directions",
    "import_esft",
    "import_expert_lora",
    "load_without_base",
    "make_batches",
    "merge_for_task",
    "read_texts",
    "routing_report",
]
