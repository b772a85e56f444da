"""What people do with finished adapters; each tool is a file."""

from __future__ import annotations

from ..layers.router_norms import router_norms
from .add_expert import add_expert
from .average_experts import Averaged, average_experts
from .choose_loras import ChosenLoras, choose_loras
from .compose import compose, train_router_alone
from .compress import Compressed, compress_adapter, decompress_adapter
from .data_mixing import DynamicMixing, MixedData
from .distil import Distilled, distil_to_lora
from .esft_files import export_esft, import_esft
from .expert_lora_files import export_expert_lora, export_per_expert, import_expert_lora
from .expert_mask import expert_mask
from .expert_vectors import describe_experts
from .export_lora import export_lora
from .export_merged import export_merged
from .merge_for_task import merge_for_task
from .mixture_files import import_mixture
from .prototypes import fit_centroids, fit_directions
from .prune_experts import SmallerAdapter, prune_experts
from .report import RoutingReport, make_batches, read_texts, routing_report
from .saturation import routing_saturation
from .self_contrast import SelfContrast
from .similarity import delta_similarity
from .slim import slim
from .super_experts import super_experts
from .upcycle import upcycle
from .without_base import load_without_base

__all__ = [
    "Averaged",
    "ChosenLoras",
    "Compressed",
    "Distilled",
    "DynamicMixing",
    "MixedData",
    "RoutingReport",
    "SelfContrast",
    "SmallerAdapter",
    "add_expert",
    "average_experts",
    "choose_loras",
    "compose",
    "compress_adapter",
    "decompress_adapter",
    "delta_similarity",
    "describe_experts",
    "distil_to_lora",
    "expert_mask",
    "export_esft",
    "export_expert_lora",
    "export_lora",
    "export_merged",
    "export_per_expert",
    "fit_centroids",
    "fit_directions",
    "import_esft",
    "import_expert_lora",
    "import_mixture",
    "load_without_base",
    "make_batches",
    "merge_for_task",
    "prune_experts",
    "read_texts",
    "router_norms",
    "routing_report",
    "routing_saturation",
    "slim",
    "super_experts",
    "train_router_alone",
    "upcycle",
]
