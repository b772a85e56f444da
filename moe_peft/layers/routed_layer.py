"""How one adapter acts in a forward pass: its router decides, the decision is noted, its experts act on it."""

from __future__ import annotations

from functools import partial

import torch

from ..experts import Experts, PendingRouting
from ..ops import cast_to_compute_dtype, joins
from ..routers import Router
from ..telemetry.stacked import as_sums
from ..telemetry.statistics import RoutingStatistics
from ..types import Routing, TokenContext
from .merging_layer import MergingLayer
from .shared_rows import is_plain, products, shared_rows


class RoutedLayer(MergingLayer):
    """Base of all layers with routed adapters; arguments as in `AdapterLayer`."""

    def note(self, adapter_name: str, routing: Routing) -> Routing:
        """Inject the router losses of a training pass, and tell the tracker what was decided.

        Args:
            adapter_name: Whose decision it is.
            routing: The decision.

        Returns:
            The same decision, whose weights must be used.
        """
        objective, training = self.objectives[adapter_name], routing.context.training
        counts = routing.context.of_tokens
        if training and objective and counts:
            routing = objective(routing, self.tracker, self.place, adapter_name)
        if counts:
            self.tracker.record(self.place, adapter_name, routing)
        if self.block is not None:
            self.tracker.led[self.block, adapter_name] = routing
        if training and counts and self.counts_decisions(adapter_name):
            self.tracker.count(self.place, adapter_name, as_sums(RoutingStatistics.of(routing)))
        return routing

    def counts_decisions(self, adapter_name: str) -> bool:
        """Whether a part changes after each optimizer step by what was decided.

        Args:
            adapter_name: Of the adapter whose parts are asked.
        """
        router, _ = self.parts_of(adapter_name)
        return self.objectives[adapter_name].adapts or (router is not None and router.counts)

    def add(
        self,
        adapter_name: str,
        x_TD: torch.Tensor,
        out_TO: torch.Tensor,
        context: TokenContext,
        *,
        routing: Routing | None = None,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Let one adapter act: decide, note the decision, and bring its experts into the output.

        Args:
            adapter_name: Whose parts.
            x_TD: (T, D) input of the wrapped module.
            out_TO: (T, O) its output, with the adapters before this one.
            context: What is known about the tokens.
            routing: A decision that has been made and noted; None lets the adapter's router decide.
            in_place: Whether `out_TO` may be overwritten.

        Returns:
            (T, O) in the dtype of `out_TO`.
        """
        router, bank = self.parts_of(adapter_name)
        read_TD = x_TD if bank.casts_input else cast_to_compute_dtype(x_TD)
        if routing is not None or router is None:
            return bank(read_TD, out_TO, routing, in_place=in_place)
        if router.reads == "block":
            return bank(read_TD, out_TO, router(self._led(adapter_name, x_TD), context), in_place=in_place)
        if router.reads == "activations":
            decide = partial(self.route, adapter_name, context=context)
            return bank(read_TD, out_TO, PendingRouting(context, decide, x_TD), in_place=in_place)
        if router.probes(context):
            decide = partial(self._route_by_responses, adapter_name, x_TD, context)
            return bank(read_TD, out_TO, PendingRouting(context, decide, x_TD), in_place=in_place)
        weight = router.constant_weight
        if weight is not None and not self.objectives[adapter_name] and self._unseen(router, bank):
            out = bank.add_all(read_TD, out_TO, weight, context, in_place=in_place)
            if out is not None:
                return out
        gates_TE = self.unseen_gates(router, bank, x_TD, context)
        if gates_TE is not None:
            return bank.add_gated(read_TD, out_TO, gates_TE, context, in_place=in_place)
        rows = shared_rows(router, bank, read_TD, context) if joins(x_TD.shape[0]) else None
        if rows is not None:
            h_TR, logits_TE = products(read_TD, *rows)
            routing = self.note(adapter_name, router.decide(logits_TE, context))
            return bank.combine(h_TR, out_TO, routing, in_place=in_place)
        # A router reads the input as it comes: autocast's rounding would change which experts are selected.
        return bank(read_TD, out_TO, self.note(adapter_name, router(x_TD, context)), in_place=in_place)

    def unseen_gates(
        self, router: Router, bank: Experts, x_TD: torch.Tensor, context: TokenContext
    ) -> torch.Tensor | None:
        """Weights that experts can act on without a decision, where nobody would see one.

        Args:
            router: Of an adapter here, which reads the input.
            bank: Its experts.
            x_TD: (T, D) what the router reads, also of heads.
            context: What is known about the tokens.

        Returns:
            (T, E); None in training passes, for as many tokens as are worth a joined product, where somebody looks
            at decisions or calls, and for parts that have no such way.
        """
        if context.training or joins(x_TD.shape[0]) or not self._unseen(router, bank):
            return None
        return router.gates(x_TD, context) if bank.takes_gates(x_TD, router.num_slots) else None

    def _unseen(self, router: Router, bank: Experts) -> bool:
        """Whether nobody sees what a router decides, nor that router and experts are called."""
        return self.block is None and not self.tracker.watched() and is_plain(router, bank)

    def _led(self, adapter_name: str, x_TD: torch.Tensor) -> Routing:
        """The decision that the first place of the block has made about the same tokens.

        Raises:
            ValueError: There is none, as the model runs this place first.
        """
        led = None if self.block is None else self.tracker.led.get((self.block, adapter_name))
        if led is None or led.probs.shape[0] != x_TD.shape[0]:
            raise ValueError(
                f"{self.place} follows the decision of its block's first place, which has not decided about these "
                "tokens: the model runs them in another order. Leave one of them out of target_modules, or set "
                "router_scope='place'."
            )
        return led

    def route(self, adapter_name: str, x_TD: torch.Tensor, context: TokenContext) -> Routing:
        """Let an adapter's own router decide, and note the decision.

        Args:
            adapter_name: Whose router.
            x_TD: What it reads, (T, D) input or (T, E, r) activations.
            context: What is known about the tokens.
        """
        return self.note(adapter_name, self.router[adapter_name](x_TD, context))

    def _route_by_responses(
        self, adapter_name: str, x_TD: torch.Tensor, context: TokenContext, activations_TEr: torch.Tensor
    ) -> Routing:
        """Let an adapter's router decide by what each expert would add, and note the decision."""
        responses = self.experts[adapter_name].responses(activations_TEr)
        return self.note(adapter_name, self.router[adapter_name](x_TD, context, responses))

    def check_rows(self, adapter_names: list[str], x: torch.Tensor, min_dim: int = 1) -> None:
        """Refuse adapter names that cannot be matched with the rows of an input.

        Args:
            adapter_names: Adapter of each row.
            x: (..., D) input of the layer.
            min_dim: Dimensions below which x holds flattened tokens, no rows.

        Raises:
            ValueError: There is not one name per row, or an adapter is merged into the base weight.
        """
        if self.rows == "media":
            raise ValueError(
                f"Cannot pass `adapter_names`: {self.place} reads images or sound, which do not tell the row of the "
                "batch they belong to. Leave the encoders out of an adapter whose rows are to be mixed; "
                "target_modules=None does."
            )
        if self.rows in ("positions", "tokens_and_positions"):
            raise ValueError(
                f"Cannot pass `adapter_names`: {self.place} reads embeddings of relative positions, which belong to "
                "no row of the batch. Leave it out of an adapter whose rows are to be mixed; exclude_modules does."
            )
        if len(adapter_names) != x.shape[0] or x.dim() < min_dim:
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(adapter_names)} "
                f"and {tuple(x.shape[:-1])} respectively at {self.place}. Give one name per row of the batch; layers "
                "that receive flattened tokens cannot mix adapters in a batch."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
