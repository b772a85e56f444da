"""What kinds of experts share: a bank of parameters, of which each token uses some.

    h = prepare(x),   out = combine(h, base, routing)

Additive kinds add a routed sum to what the frozen module gave; multiplicative ones scale it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops import without_rounding
from ..place import Place
from ..types import Routing, TokenContext
from .undecided_sums import UndecidedSums


class PendingRouting(NamedTuple):
    """A decision that waits for what the experts make of the input.

    Attributes:
        context: What is known about the tokens.
        decide: Makes the decision of (T, E, r) activations.
        x_TD: (T, D) input as it came; None where autocast has not rounded what the bank is given.
    """

    context: TokenContext
    decide: Callable[[torch.Tensor], Routing]
    x_TD: torch.Tensor | None = None


class Experts(UndecidedSums, nn.Module):
    """A bank of experts at one place.

    The constructor takes in_features (D) and out_features (O), and by keyword num_experts (E), r where the kind has a
    rank, and the class's `fields` and `options`.

    Attributes:
        num_choices: Columns of the decision that the bank expects.
        placement: Kind of place that the bank acts in, see `MoeConfig.placement`; None for any that adds to an output.
        reads_weight: Whether the bank starts from the weight of the wrapped layer, so that it acts on linear layers.
        casts_input: Whether the bank brings its input to the compute dtype itself, so that it can keep what comes for
            the backward pass instead of a copy; others are given a copy where autocast asks for one.
    """

    num_choices: int
    placement: str | None = None
    reads_weight: bool = False
    casts_input: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let no class inherit a promise that it may break: to be mergeable, to be split, or to cast its input."""
        super().__init_subclass__(**kwargs)
        for promise in ("mergeable", "splits"):
            if promise not in cls.__dict__:
                setattr(cls, promise, False)
        if "casts_input" not in cls.__dict__ and {"prepare", "forward"} & set(cls.__dict__):
            cls.casts_input = False

    @classmethod
    def shapes(cls, num_experts: int, r: int) -> dict[str, tuple[int, ...]]:
        """How the shapes of saved tensors begin, by parameter name.

        Args:
            num_experts: E.
            r: Rank of one expert.
        """
        raise NotImplementedError(f"{cls.__name__} does not say which tensors it saves.")

    @classmethod
    def saved_shapes(cls, num_experts: int, r: int, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """How the shapes of saved tensors begin, of a bank with some options.

        Args:
            num_experts: E.
            r: Rank of one expert.
            options: Value of each of the kind's options.
        """
        return cls.shapes(num_experts, r)

    @classmethod
    def further_choices(cls, options: Mapping[str, Any]) -> int:
        """Columns of the decision beyond the configuration's experts, of a bank with some options.

        Args:
            options: Value of each of the kind's options.
        """
        return 0

    @classmethod
    def sizes_of(cls, place: Place) -> dict[str, Any]:
        """Further keywords of the constructor that follow from the place.

        Args:
            place: The module that the layer wraps.
        """
        return {}

    def prepare(self, x_TD: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """What the experts make of the input before anything is decided.

        Args:
            x_TD: (T, D) input in the compute dtype; as it comes where the kind `casts_input`.
            context: What is known about the tokens.

        Returns:
            (T, ...) whatever `combine` takes.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it reads its input.")

    def activations(self, h: torch.Tensor) -> torch.Tensor:
        """A_e x of each expert apart, for routers that read it; kinds that have it give "activations".

        Args:
            h: Of `prepare`.

        Returns:
            (T, E, r); (T, 1, r) of kinds whose experts share the matrix, which give "shared_activations".
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no activations of each expert apart.")

    def responses(self, activations_TEr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each expert alone would add under the weight one, as products; kinds that have it give "responses".

        Args:
            activations_TEr: Of `activations`.

        Returns:
            (T, E, r) and (E, r, O), whose product of an expert's r columns and rows is its (T, O).
        """
        raise NotImplementedError(f"{type(self).__name__} does not tell what each expert alone would add.")

    def combine(
        self, h: torch.Tensor, base_out_TO: torch.Tensor, routing: Routing, *, in_place: bool = False
    ) -> torch.Tensor:
        """Bring the routed experts into the base output.

        Args:
            h: Of `prepare`.
            base_out_TO: (T, O) output of the frozen module.
            routing: Decision for the T tokens.
            in_place: Whether `base_out_TO` may be overwritten.

        Returns:
            (T, O) in the dtype of `base_out_TO`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it combines its experts.")

    def forward(
        self,
        x_TD: torch.Tensor,
        base_out_TO: torch.Tensor,
        routing: Routing | PendingRouting,
        *,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Bring the routed experts into the base output.

        Args:
            x_TD: (T, D) input in the compute dtype; as it comes where the kind `casts_input`.
            base_out_TO: (T, O) output of the frozen module.
            routing: Decision for the T tokens, or what makes it of the activations.
            in_place: Whether `base_out_TO` may be overwritten.

        Returns:
            (T, O) in the dtype of `base_out_TO`.
        """
        h = self.prepare(x_TD, routing.context)
        if isinstance(routing, PendingRouting):
            came_TD = x_TD if routing.x_TD is None else routing.x_TD
            routing = routing.decide(self.activations(self.undropped(came_TD, h, routing.context)))
        return self.combine(h, base_out_TO, routing, in_place=in_place)

    def undropped(self, x_TD: torch.Tensor, h: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """What `prepare` makes of the input where nothing is dropped or rounded, as neither decides about a token.

        Args:
            x_TD: (T, D) input as it came.
            h: Of `prepare` in this pass.
            context: What is known about the tokens.

        Returns:
            `h` itself where no dropout acts and it is float32 or wider; see `read_for_decision`.
        """
        return h

    def directions(self) -> torch.Tensor:
        """The direction of the input that each expert answers most, of kinds that know it.

        Returns:
            (E, D) unit vectors, float32 or wider, of either sign.

        Raises:
            ValueError: The kind does not know it, or an expert answers nothing.
        """
        raise ValueError(f"{type(self).__name__} does not know which direction of the input an expert answers most.")

    def delta_products(self) -> torch.Tensor | None:
        """The inner products of what the experts add, <D_e, D_f> = tr(D_e' D_f), of kinds that know them.

        D_e is the matrix, or the vector of offsets, that expert e alone stands for, of a nonlinear one the product of
        its matrices; it is not built.

        Returns:
            (E, E) float64 of the experts that routers choose between; None of kinds that add no such thing.
        """
        return None

    def even_out(self) -> None:
        """Let activations of the experts have equal sizes at the start, for routers that compare them."""

    def shared_rows(self, context: TokenContext) -> torch.Tensor | None:
        """The matrix whose product with the layer's input is all that `prepare` computes in this pass.

        Args:
            context: What is known about the tokens.

        Returns:
            (R, D), whose GEMM may take a router's rows along; None where `prepare` is anything else.
        """
        return None

    def implementation(
        self,
        num_tokens: int,
        num_slots: int,
        *,
        dtype: torch.dtype | None = None,
        device_type: str | None = None,
    ) -> str | None:
        """Name of the op that computes a routed sum, of kinds that have several.

        Args:
            num_tokens: T.
            num_slots: K, experts a token uses.
            dtype: What is computed in; None takes the parameters' own.
            device_type: Where, as "cpu"; None takes the parameters' own.

        Returns:
            A key of `moe_peft.ops.IMPLEMENTATIONS`; None where `combine` is the only way.
        """
        return None

    def delta_weight(self, weights_E: torch.Tensor) -> torch.Tensor:
        """The matrix that the experts add to the base weight under a constant routing, of kinds that are mergeable.

        Args:
            weights_E: (E,) combine weights.

        Returns:
            (O, D) float32 or wider.
        """
        raise NotImplementedError(f"{type(self).__name__} adds no matrix to the base weight.")

    def delta_factors(self, weights_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A low-rank pair whose product B A is `delta_weight`, as a plain LoRA stores it.

        Kinds that are made of such pairs give their own; this one finds the smallest pair, exact to rounding.

        Args:
            weights_E: (E,) combine weights.

        Returns:
            A (R, D) and B (O, R), float32 or wider.
        """
        delta_OD = self.delta_weight(weights_E)
        U_OR, S_R, V_RD = torch.linalg.svd(delta_OD, full_matrices=False)
        tolerance = float(S_R[0]) * max(delta_OD.shape) * torch.finfo(delta_OD.dtype).eps
        rank = max(int((tolerance < S_R).sum()), 1)
        return V_RD[:rank], U_OR[:, :rank] * S_R[:rank]

    def mean_factors(self, weights_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A low-rank pair of one expert's rank that stands for the experts' mean, by their weights.

        Kinds with two matrices for each expert take the mean of either, which is not that of the products; the other
        kinds have `delta_factors` of that rank.

        Args:
            weights_E: (E,) combine weights.

        Returns:
            A (r, D) and B (O, r), float32 or wider.
        """
        return self.delta_factors(weights_E)

    def _apply(self, fn: Callable, recurse: bool = True) -> Experts:
        """Follow a change of device, but never one to a 16-bit dtype, where the parameters stay float32."""
        super()._apply((lambda t: without_rounding(t, fn(t))) if self.keeps_float32 else fn, recurse)
        return self
