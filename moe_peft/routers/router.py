"""What routers share: scores z of the experts, a gate function p of them, and a rule that selects by both.

    z = scores(x),   p = Dropout(gate(z)),   routing = select(z, p)

A router class is a scorer, the only one of the three with trained parameters; it owns a gate and a selector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import nn

from ..messages import shown
from ..ops import without_rounding
from ..part import ModulePart, Reads
from ..types import Routing, StepStatistics, TokenContext
from .gates import Gate, Softmax
from .selector import Selector


class RouterArgs(TypedDict, total=False):
    """Keywords that a scorer hands on to its base; see `Router`."""

    select: Selector | None
    gate: Gate | None
    routed_scaling_factor: float
    expert_dropout: float


class Router(ModulePart, nn.Module):
    """Decides which experts a token uses, and with which weight.

    Args:
        in_features: D, width of the input.
        num_experts: E.
        select: Rule that selects; None where a subclass has a `decide` or a `forward` of its own.
        gate: Gate function; None takes the softmax.
        routed_scaling_factor: Factor of all weights, after any rescaling.
        expert_dropout: Probability that a gate is dropped in training passes; survivors are divided by 1 - p.
        init_std: Standard deviation of a normal initialisation of what a router has to initialise, if anything.

    Attributes:
        reads: What it is given as x: the layer's input, the experts' activations (T, E, r), or (T, 1, r) of a down
            matrix that they share, the decision of the block's first router, or the input again where it decides by
            what the context holds.
        gives: "extra_scores", further columns that a selector reads, where a scorer is not limited to the experts.
        log_scores: Whether its scores are logarithms of probabilities, none of which is above zero.
        learns: Whether it has parameters that the task or a router loss trains.
        descriptions: Name of the parameter that holds a description of each expert (E, width), of routers that make
            their rows of it; tools set it.
        one_draw: Whether what a training pass draws at random holds for all of its rows.
        takes_prototypes: Whether its `weight` holds a vector of the input's space for each expert, which tools set.
        perturbs_training: Whether training passes may decide otherwise than evaluation does: with jitter, dropped
            gates, a capacity or sampled gates. Trainers that compare two passes of a model set it to False.
        num_scores: Columns of z: E, and the selector's further ones.
    """

    fields: tuple[str, ...] = ("routed_scaling_factor", "expert_dropout")
    gives = frozenset({"extra_scores"})
    reads: Reads = "input"
    log_scores: bool = False
    learns: bool = False
    descriptions: str | None = None
    one_draw: bool = False
    takes_prototypes: bool = False
    keeps_float32 = True
    varies = frozenset({"expert_dropout"})
    perturbs_training: bool = True
    _as_defined: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let no class inherit the promise that its weights are the same for every token, if it makes them itself."""
        super().__init_subclass__(**kwargs)
        if "mergeable" not in cls.__dict__ and {"scores", "decide", "forward"} & set(cls.__dict__):
            cls.mergeable = Router.mergeable  # type: ignore[method-assign]
        cls._as_defined = cls.decide is Router.decide and cls.forward is Router.forward

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        select: Selector | None = None,
        gate: Gate | None = None,
        routed_scaling_factor: float = 1.0,
        expert_dropout: float = 0.0,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.routed_scaling_factor = routed_scaling_factor
        self.expert_dropout = nn.Dropout(expert_dropout)
        self.gate = gate or Softmax()
        self.select = select
        self.num_scores = num_experts + (0 if select is None else select.extra_scores)
        own = {} if select is None else select.tensors(num_experts)
        for name, tensor in own.items():
            if hasattr(self, name):
                raise ValueError(
                    f"{type(select).__name__}: a selector's tensor cannot be called {shown(name)}, which every router "
                    "has. Choose another name in `Selector.tensors`."
                )
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._selector_tensors = tuple(own)
        self._registered = {name: self.get_parameter(name) for name in own}
        self.frozen = (*type(self).frozen, *own)
        for promise in ("causal", "batch_invariant", "decode_stateless", "separable"):
            members = [part for part in (type(self), self.gate, select) if part is not None]
            setattr(self, promise, all(getattr(part, promise) for part in members))
        self.context_needs = frozenset().union(*(part.context_needs for part in members))
        self.gives = frozenset().union(*(part.gives for part in members))
        self.needs = frozenset().union(*(part.needs for part in members)) - self.gives

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """Whether the weights are the same for every token, as those of one expert under a gate that sums to one."""
        own_decision = type(self).decide is not Router.decide or type(self).forward is not Router.forward
        return (
            not own_decision
            and not self.context_needs
            and self.num_experts == 1
            and self.gate.sums_to_one
            and self.select is not None
            and self.select.constant_for_one
            and not (self.select.gates_extra and self.select.extra_scores)
        )

    @property
    def constant_weight(self) -> float | None:
        """The one weight of every expert for every token, where that needs no decision; None elsewhere."""
        return None

    @property
    def num_slots(self) -> int:
        """K, experts a token uses; E where that is not fixed."""
        own = None if self.select is None else self.select.num_slots
        return self.num_experts if own is None else own

    def check_names(self) -> None:
        """Check that nothing of the scorer stands in the place of a selector's tensor; called after construction.

        Raises:
            ValueError: Both have something of one name, of which a module keeps the last.
        """
        for name, parameter in self._registered.items():
            if self._parameters.get(name) is not parameter:
                raise ValueError(
                    f"The scorer {type(self).__name__} and the selector {type(self.select).__name__} both have "
                    f"{shown(name)}, and a router holds one of that name. Rename it in the scorer, or in "
                    "`Selector.tensors`."
                )
        self._registered = {}

    def stands_in(self, layer_index: int, num_layers: int) -> None:
        """Start as fits a layer, of routers that differ between layers; called once, after construction.

        Args:
            layer_index: Index of the layer in its stack, from zero.
            num_layers: Layers of the stack.
        """

    def start_without_tokens(self, weight: nn.Parameter, std: float) -> None:
        """Initialise scores that no token's input changes; above zero where the gate needs that, or none would learn.

        Args:
            weight: The scores, or factors that they are products of.
            std: Standard deviation around zero.
        """
        nn.init.normal_(weight, std=std)
        if self.gate.needs_positive:
            weight.data.abs_().add_(1 / self.num_experts)

    def scale(self, weights: torch.Tensor) -> torch.Tensor:
        """Apply `routed_scaling_factor` to combine weights of any shape."""
        return weights if self.routed_scaling_factor == 1.0 else weights * self.routed_scaling_factor

    def deciding(self, context: TokenContext) -> TokenContext:
        """The context that scores, gate and selector see: that of evaluation where nothing may perturb a decision."""
        return replace(context, training=False) if context.training and not self.perturbs_training else context

    def scores(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Score the experts for each token.

        Args:
            x: What the router reads, (T, D) or (T, E, r), of any floating dtype.
            context: What is known about the tokens.

        Returns:
            (T, num_scores) router logits, float32 (float64 for float64 input), whatever dtype the router's parameters
            have been given.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither scores nor a forward of its own.")

    @property
    def counts(self) -> bool:
        """Whether something changes after each optimizer step by what was decided, so that decisions are counted."""
        return self.select is not None and self.select.counts

    @torch.no_grad()
    def after_step(self, statistics: StepStatistics) -> None:
        """Let the selector change its tensors after an optimizer step.

        Args:
            statistics: What this router decided in the training passes of the step, of all processes.
        """
        if self.select is not None:
            own = {name: getattr(self, name) for name in self._selector_tensors}
            self.select.after_step(statistics, **own)

    def shared_rows(self, context: TokenContext) -> torch.Tensor | None:
        """The matrix whose product with the layer's input is all that `scores` computes in this pass.

        Args:
            context: What is known about the tokens.

        Returns:
            (num_scores, D), which the experts' GEMM may take along; None where the scores are anything else.
        """
        return None

    def probes(self, context: TokenContext) -> bool:
        """Whether this pass's decision also reads what each expert would add, a third argument of its forward then.

        Args:
            context: What is known about the tokens.
        """
        return False

    def gates(self, x: torch.Tensor, context: TokenContext) -> torch.Tensor | None:
        """Combine weights without a decision, for passes in which nobody sees one, as where a token is decoded.

        Args:
            x: What the router reads, (T, D) or (T, E, r), of any floating dtype.
            context: What is known about the tokens, outside of a training pass.

        Returns:
            (T, E) what `Routing.gate_matrix` gives of the decision; None where the decision is the only way to it.
        """
        select = self.select
        if select is None or type(select).gates is Selector.gates or not self._as_defined or "decide" in self.__dict__:
            return None
        if self._selector_tensors or self.num_scores != self.num_experts:
            return None
        logits_TE = self.scores(x, context)
        if logits_TE.shape[-1] != self.num_scores:  # `decide` says what is wrong
            return None
        gates_TE = select.gates(self.gate(logits_TE, context))
        return gates_TE if gates_TE is None or self.routed_scaling_factor == 1.0 else self.scale(gates_TE)

    def decide(self, logits_TE: torch.Tensor, context: TokenContext) -> Routing:
        """Turn scores into a decision.

        Args:
            logits_TE: (T, num_scores) router logits.
            context: What is known about the tokens.

        Raises:
            ValueError: There are more scores, or fewer.
        """
        if self.select is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a selector nor a decision of its own.")
        if logits_TE.shape[-1] != self.num_scores:
            raise ValueError(
                f"{type(self).__name__}.scores gave {logits_TE.shape[-1]} columns, where the decision is about "
                f"num_scores={self.num_scores}. Let it give one for each."
            )
        seen = context if self.perturbs_training else self.deciding(context)
        columns = self.num_scores if self.select.gates_extra else self.num_experts
        gated_TE = logits_TE if columns == self.num_scores else logits_TE[:, :columns]
        probs_TE = self.gate(gated_TE, seen)
        if seen.training:
            probs_TE = self.drop(probs_TE, seen)
        own = {name: getattr(self, name) for name in self._selector_tensors} if self._selector_tensors else {}
        routing = self.select(logits_TE, probs_TE, seen, self.num_experts, **own)
        if self.routed_scaling_factor != 1.0 or seen is not context:
            routing = replace(routing, weights=self.scale(routing.weights), context=context)
        return routing

    def drop(self, probs_TE: torch.Tensor, context: TokenContext) -> torch.Tensor:
        """Apply `expert_dropout` in training passes; a dropped gate is exactly zero."""
        return self.expert_dropout(probs_TE) if context.training and self.expert_dropout.p > 0 else probs_TE

    def forward(self, x: torch.Tensor, context: TokenContext) -> Routing:
        """Decide about each token.

        Args:
            x: What the router reads, (T, D) or (T, E, r), of any floating dtype.
            context: What is known about the tokens.
        """
        seen = context if self.perturbs_training else self.deciding(context)
        return self.decide(self.scores(x, seen), context)

    def _apply(self, fn: Callable, recurse: bool = True) -> Router:
        """Follow a change of device, but never one to a 16-bit dtype, where the parameters stay float32."""
        super()._apply((lambda t: without_rounding(t, fn(t))) if self.keeps_float32 else fn, recurse)
        return self
