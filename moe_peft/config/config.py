"""What every adapter type's configuration is: checked values, the places it goes to, and parts that it builds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft.config import PeftConfig
from torch import nn

from ..messages import LIMIT, shown
from ..part import Part
from ..place import MoeLayer, Place
from .absent import TARGET_PARAMETERS, Absent
from .meaning import NOT_MEANING, meaning_of
from .parts import AROUND_WEIGHTS, RoutedParts
from .patterns import NAMES_OR_PATTERN, PARTS_OF_NAMES, check_patterns
from .saved import SavedConfig

SCHEMA_VERSION = 1
# Name of the router of adapters whose experts follow the backbone's own routing.
BACKBONE = "backbone"
PEFT_FIELDS = frozenset(own.name for own in dataclasses.fields(PeftConfig))


@dataclass
class MoeConfig(SavedConfig):
    """Base of the configurations of all adapter types; use one of its subclasses.

    A subclass is composed from the groups of fields that mean something for it (see `fields`), overrides defaults with
    its paper's values, names its `method` and its `equation`, implements `build`, and says which kind of module it
    wraps (`placement`) where that is not a linear layer.

    Attributes:
        default_targets: Which linear layers are adapted where nothing is said.
        absent_fields: Field name -> value and reason, see `accepts_absent`.
    """

    default_targets: ClassVar[Literal["ffn", "attention", "all"]] = "ffn"
    absent_fields: ClassVar[Absent] = TARGET_PARAMETERS
    target_parameters: ClassVar[None] = None  # peft asks for it

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or a regex) of the linear layers to adapt, or 'all-linear' for every linear layer that is "
            "neither a router nor the output head. None picks the paper's places from the model's structure.",
            **NAMES_OR_PATTERN,
            **NOT_MEANING,
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Further modules to train in full and save with the adapter.",
            **PARTS_OF_NAMES,
            **NOT_MEANING,
        },
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Token ids whose embeddings are trained, or ids by embedding layer name."},
    )
    schema_version: int = field(
        default=SCHEMA_VERSION, metadata={"help": "Version of this file's layout.", **NOT_MEANING}
    )

    def __post_init__(self) -> None:
        self._take_as_declared()
        self._check_types()
        hint = "one of peft's task types, as 'CAUSAL_LM', or None"
        self._check(self.task_type is None or len(self.task_type) <= LIMIT, "task_type", hint)
        super().__post_init__()
        if self.peft_type is not None and str(getattr(self.peft_type, "value", self.peft_type)) != self.adapter_type:
            raise ValueError(
                f"peft_type={shown(self.peft_type)} does not belong to {type(self).__name__}, which is of type "
                f"{shown(self.adapter_type)}. Leave peft_type out, or load the file with "
                "peft.PeftConfig.from_pretrained, which picks the right class."
            )
        self._fill_in()
        self._make_sets()
        self._make_lists()
        self.validate()
        self.advise()

    def _fill_in(self) -> None:
        """Replace None where a field's default follows from other fields."""

    def _make_sets(self, *names: str) -> None:
        """Keep names of modules as sets, as peft does."""
        for name in ("target_modules", *names):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))

    def _make_lists(self) -> None:
        """Keep token ids that were given as sets as lists, with which peft indexes an embedding."""
        tokens = self.trainable_token_indices
        if isinstance(tokens, Mapping):
            self.trainable_token_indices = {layer: _in_order(ids) for layer, ids in tokens.items()}
        elif tokens is not None:
            self.trainable_token_indices = _in_order(tokens)

    @property
    def placement(self) -> str:
        """Kind of module that is wrapped, see `layers.LAYERS`."""
        return "linear"

    def placement_at(self, place: Place) -> str:
        """Kind of layer at one place, for types that wrap more than one kind of module."""
        return self.placement

    @property
    def default_learning_rate(self) -> float:
        """Rate at which AdamW trains the adapter in supervised fine-tuning where nobody says one: that of LoRA."""
        return 2e-4

    @property
    def permits_non_causal(self) -> bool:
        """Whether a causal language model may have parts with which a later token, or another row, changes a token."""
        return False

    @property
    def shares_decisions(self) -> bool:
        """Whether the places of a block follow the decision of its first."""
        return False

    @property
    def layer_selection(self) -> tuple[list[int] | int | None, list[str] | str | None]:
        """Indices of the layers that are adapted, and the module list they count in; None where nothing is said."""
        return None, None

    @property
    def group_columns(self) -> dict[str, frozenset[int]]:
        """Batch columns with the group of each sample that the adapter may read.

        Each comes with the groups that own experts or that a router knows, which batches must then bring; none where
        any will do.
        """
        return {}

    @property
    def group_readers(self) -> dict[str, list[str]]:
        """Batch columns that training needs: what reads each, names of this class's fields and of parts' classes."""
        parts = [own.__name__ for own in self.classes() if issubclass(own, Part) and "groups" in own.context_needs]
        return {column: parts for column in self.group_columns if parts}

    @property
    def mergeable(self) -> bool:
        """Whether `merge_and_unload` is exact, as the adapter does the same for every input.

        It is asked of the parts of every layer, and of the kind of place: a whole block has no weight that an adapter
        could be merged into.
        """
        if self.placement not in AROUND_WEIGHTS:
            return False
        with torch.device("meta"):
            return all(self.at(place).build(place).mergeable for place in self.typical_places())

    def typical_places(self) -> list[Place]:
        """Places that stand for all layers of a model: one for each configuration that `at` can return."""
        return [Place.typical()]

    def keep_places(self, places: Sequence[Place]) -> None:
        """Keep which places a model has, so that `typical_places` stand for these alone; it is not saved.

        Args:
            places: All that the configuration has been resolved to.
        """

    def sizes_at(self, place: Place) -> dict[str, int]:
        """The sizes of a place by field, where layers differ in them; none where all are alike.

        Args:
            place: The module that a layer will wrap.
        """
        return {}

    def at(self, place: Place) -> MoeConfig:
        """The configuration of one place, with its own sizes where they differ between layers.

        Args:
            place: The module that a layer will wrap.
        """
        return self

    def build(self, place: Place) -> RoutedParts:
        """Build the parts of one layer, of the configuration that `at` returns for its place.

        Args:
            place: The module that the layer will wrap.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say how to build a layer; use one of its subclasses."
        )

    def validate(self) -> None:
        """Check every field.

        Raises:
            ValueError: A value cannot work; the message names the value and what to write instead.
        """
        hint = f"at most {SCHEMA_VERSION}; upgrade peft-moe"
        self._check(self.schema_version <= SCHEMA_VERSION, "schema_version", hint)
        for name, reason in self.fixed_fields.items():
            self._check_left_alone(name, reason)
        check_patterns(self)

    def advise(self) -> None:
        """Warn, when a configuration is made, of settings that work and are unlikely to be meant."""

    def recheck(self) -> None:
        """Check every field again, as it may have been changed since the configuration was made.

        Raises:
            ValueError: A value is of another type, or cannot work.
        """
        self._check_types()
        self.validate()

    def meaning(self) -> dict[str, Any]:
        """What gives the adapter's saved tensors their meaning, beside their names and shapes.

        The adapter type, and every field that changes what the same tensors compute: all but peft's own, and those
        whose metadata says `"meaning": False` (the start of training, its losses and noise, speed, places).

        Returns:
            Field name -> value of JSON's types; equal for configurations under which tensors may be exchanged.
        """
        return meaning_of(self, skipped=PEFT_FIELDS)

    def resolve(self, model: nn.Module, layers: Sequence[MoeLayer]) -> None:
        """Fill in and check what depends on the model, before any weight is changed.

        Args:
            model: The model to adapt.
            layers: Its sparse layers.
        """

    def adapts(self, layer: MoeLayer) -> bool:
        """Whether a sparse layer of the model gets an adapter by default."""
        return True

    def summary(self) -> str:
        """Experts and router in a few words, for the dry run."""
        return self.method


def _in_order(ids: list[int] | set[int]) -> list[int]:
    return sorted(ids) if isinstance(ids, (set, frozenset)) else list(ids)
