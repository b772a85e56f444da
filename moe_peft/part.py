"""What a part of an adapter (scorer, gate, selector, expert kind, loss) says of itself: options and promises.

Configurations, tuner, trainers' callbacks and tools ask these attributes of whatever is registered, so that a part is
one file and one line in a registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Words of `Part.gives` and `Part.needs` that are no names in `Routing.extras`.
ABILITIES = frozenset({"selection", "activations", "shared_activations", "responses", "extra_scores"})


@dataclass(frozen=True)
class Option:
    """A number or choice that belongs to one part alone, and is no field of a configuration.

    Attributes:
        name: Keyword of the part's constructor.
        default: What is taken where nothing is given.
        expected: What a value must be, in words that follow "must be".
        fits: Whether a value can work; a TypeError counts as no.
        help: One sentence with unit and source.
    """

    name: str
    default: Any
    expected: str
    fits: Callable[[Any], bool]
    help: str = ""

    def accepts(self, value: object) -> bool:
        """Whether a value can work."""
        try:
            return bool(self.fits(value))
        except (TypeError, ValueError):
            return False


class Part:
    """Base of scorers, gates, selectors, banks of experts and losses.

    A class says what holds for all its instances; an instance may say otherwise where that follows from its numbers.

    Attributes:
        fields: Names of the configuration's fields that the constructor takes by keyword, beside sizes.
        options: Further keywords of the constructor, which `router_args`, `experts_args` and `losses` set.
        gives: What is there for other parts: "selection" (some experts are left out), "activations" (A_e x of each
            expert apart), "shared_activations" (A x of all together), "responses" (what each expert alone would add),
            "extra_scores" (scores of more columns than experts), or names in `Routing.extras`.
        needs: What it asks of the other parts of a layer, in the same words.
        context_needs: Names of what `TokenContext` must hold, in evaluation too: "sequences" for mask and sequences,
            which training passes always know, and what is beyond them.
        varies: Names of its numbers that may change while it lives, as schedules do; bases add theirs.
        causal: No later token changes what an earlier one gets.
        batch_invariant: No other row of the batch changes it.
        decode_stateless: Decoding token by token gives what the full forward gives.
        separable: Experts can be left out, added and reordered: what one does depends on no other's number.
    """

    fields: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    gives: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    context_needs: frozenset[str] = frozenset()
    varies: frozenset[str] = frozenset()
    causal: bool = True
    batch_invariant: bool = True
    decode_stateless: bool = True
    separable: bool = True

    @classmethod
    def misfit(cls, options: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
        """Why its options cannot go with the sizes of a layer.

        Args:
            options: Value of each of its options.
            sizes: "num_experts", and "top_k" and "r" where the configuration has them.

        Returns:
            The option with its value and what it must be; None where they can.
        """
        return None

    @classmethod
    def known_groups(cls, options: Mapping[str, Any]) -> frozenset[int]:
        """The sample groups that it can serve, of parts that read them; empty where any will do.

        Args:
            options: Value of each of its options.
        """
        return frozenset()


class ModulePart(Part):
    """What parts with parameters say besides; mixed into `nn.Module`s.

    Attributes:
        frozen: Names of parameters that are saved but never trained: fixed, or changed by the part itself.
        keeps_float32: Whether its parameters stay float32 in a 16-bit model.
        mergeable: Whether it does the same to every token, so that the adapter can become a fixed weight.
        up: Names of the parameters that start at zero and carry the result out, for a learning rate of their own.
        ones: Names of the parameters that start at one.
        splits: Whether each of its parameters has one row for each expert, which acts on the tokens of that expert
            alone, so that processes may hold some of the rows each.
    """

    up: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    keeps_float32: bool = False
    mergeable: bool = False
    splits: bool = False

    def hold(self, num_experts: int) -> None:
        """Count the experts whose rows a process holds, where a bank `splits`.

        Args:
            num_experts: Their number.
        """
        raise NotImplementedError(f"{type(self).__name__} is not split over processes.")


# What a router is given as x.
Reads = Literal["input", "activations", "groups", "prompt", "token_ids", "block"]
