"""One expert out of each group: w = p of the largest in each of Z groups of neighbours (M6-T, arXiv 2105.15082)."""

from __future__ import annotations

from moe_peft.extend import Option, Routing, Selector

NUM_GROUPS = Option("num_groups", 1, "a whole number from 1", lambda v: isinstance(v, int) and v >= 1, "Groups, Z.")


class Prototypes(Selector):
    options = (NUM_GROUPS,)
    gives = frozenset({"selection"})

    def __init__(self, *, num_groups: int = 1) -> None:
        self.num_slots = num_groups

    @classmethod
    def misfit(cls, options, sizes):
        if sizes["num_experts"] % options["num_groups"] == 0:
            return None
        return f"num_groups={options['num_groups']} must divide num_experts={sizes['num_experts']}"

    def __call__(self, logits_TE, probs_TE, context, num_experts, **own):
        by_group_TZG = probs_TE.unflatten(-1, (self.num_slots, -1))
        weights_TZ, places_TZ = by_group_TZG.max(-1)
        starts_Z = places_TZ.new_tensor(range(0, num_experts, num_experts // self.num_slots))
        return Routing(
            weights=weights_TZ, experts=places_TZ + starts_Z, logits=logits_TE, probs=probs_TE, context=context
        )
