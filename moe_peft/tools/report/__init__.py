"""A report on what the routers of a model decide: a page to look at, plots, and the numbers."""

from __future__ import annotations

from .evidence import Advice
from .report import RoutingReport, routing_report
from .texts import make_batches, read_texts

__all__ = ["Advice", "RoutingReport", "make_batches", "read_texts", "routing_report"]
