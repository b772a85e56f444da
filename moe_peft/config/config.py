"""Fields that all routed adapter types share, their validation, and the parts a configuration builds."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft.config import PeftConfig
from torch import nn

from ..forward.joined_losses import SCOPES
from ..ops import IMPLEMENTATIONS
from ..routers import ROUTERS
from ..types import MoeLayer, MoePeftWarning, Place
from .adapter_files import check_adapter_files
from .card_section import SETTINGS, AdapterFacts, write_section
from .field_types import wrong_types
from .parts import AROUND_WEIGHTS, RoutedParts

SCHEMA_VERSION = 1
# Name of the router of adapters whose experts follow the backbone's own routing.
BACKBONE = "backbone"
PEFT_FIELDS = frozenset(own.name for own in dataclasses.fields(PeftConfig))
ROUTER_FIELDS = frozenset(name for router in ROUTERS.values() for name in router.fields)


@dataclass
class MoeConfig(PeftConfig):
    """Fields shared by the routed adapter types; use one of its subclasses.

    A subclass overrides defaults with its paper's values, names its `method` and its `equation`, implements `build`,
    and says which kind of module it wraps (`placement`) where that is not a linear layer.
    """

    method: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    source: ClassVar[str] = ""
    default_targets: ClassVar[Literal["ffn", "attention", "all"]] = "ffn"
    fixed_fields: ClassVar[dict[str, str]] = {}
    weight_fields: ClassVar[tuple[str, ...]] = ()  # which say what the saved tensors belong to
    adapter_type: ClassVar[str] = ""
    init_choices: ClassVar[tuple[bool | str, ...]] = (True, False, "gaussian")

    r: int = field(default=4, metadata={"help": "Rank of one expert."})
    lora_alpha: float = field(
        default=8, metadata={"help": "Scale of the experts: the routed sum is times lora_alpha / r."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Probability of dropping an element of the experts' input in training."}
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) instead of lora_alpha / r."}
    )
    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: A uniform as in nn.Linear, B zero. 'gaussian': A normal with standard deviation 0.02, B "
            "zero. False: both random, so the adapter is not the identity at the start (for tests)."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or a regex) of the linear layers to adapt, or 'all-linear' for every linear layer that is "
            "neither a router nor the output head. None picks the paper's places from the model's structure."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or a regex) of modules to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the decoder layers to adapt; None adapts all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Not supported: experts are adapted as modules. Leave it None."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save with the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token ids whose embeddings are trained, or ids by embedding layer name."}
    )
    num_experts: int = field(default=8, metadata={"help": "Experts at each adapted layer."})
    top_k: int | None = field(default=None, metadata={"help": "Experts a token uses; None uses all."})
    router: str = field(default="dense", metadata={"help": "Name of the router: dense, top_k or capacity."})
    router_aux_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the balance loss, per layer."})
    router_z_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the router z-loss, per layer."})
    load_balancing_scope: str = field(
        default="global_batch",
        metadata={
            "help": "What the router losses are measured on: 'micro_batch' (the batch of one process), 'global_batch' "
            "(of all processes), or 'accumulation_window' (and the micro-batches before it, in a trainer)."
        },
    )
    router_jitter_noise: float = field(
        default=0.0, metadata={"help": "Half-width of multiplicative noise on the router's input in training."}
    )
    norm_topk_prob: bool = field(
        default=False, metadata={"help": "Rescale the weights of the kept experts to sum to one."}
    )
    routed_scaling_factor: float = field(default=1.0, metadata={"help": "Factor of all combine weights."})
    expert_dropout: float = field(
        default=0.0,
        metadata={"help": "Probability of dropping an expert's gate in training; survivors are divided by 1-p."},
    )
    capacity_factor: float | None = field(
        default=None,
        metadata={
            "help": "Places of an expert over its even share of a sequence's requests, in training; None: no limit."
        },
    )
    capacity_order: str = field(
        default="position",
        metadata={
            "help": "Who is served first: 'position' (tokens in order) or 'choice' (first choices first; not causal)."
        },
    )
    allow_non_causal: bool = field(
        default=False, metadata={"help": "Permit parts with which a later token changes an earlier one's output."}
    )
    experts_implementation: str = field(
        default="dense", metadata={"help": "How the routed sum is computed: 'dense' (two GEMMs) or 'eager' (a loop)."}
    )
    schema_version: int = field(default=SCHEMA_VERSION, metadata={"help": "Version of this file's layout."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peft_type is not None and str(getattr(self.peft_type, "value", self.peft_type)) != self.adapter_type:
            raise ValueError(
                f"peft_type={self.peft_type!r} does not belong to {type(self).__name__}, which is of type "
                f"{self.adapter_type!r}. Leave peft_type out, or load the file with peft.PeftConfig.from_pretrained, "
                "which picks the right class."
            )
        for name, hint in wrong_types(self, PEFT_FIELDS):
            self._check(False, name, hint)
        self._fill_in()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        self.validate()

    def _fill_in(self) -> None:
        """Replace None where a field's default follows from other fields."""

    @property
    def placement(self) -> str:
        """Kind of module that is wrapped, see `layers.LAYERS`."""
        return "linear"

    @property
    def scaling(self) -> float:
        """s, the factor of the routed sum of experts."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def mergeable(self) -> bool:
        """Whether `merge_and_unload` is exact, as the adapter does the same for every input.

        It is asked of the parts, and of the kind of place: a whole block has no weight that an adapter could be merged
        into.
        """
        if self.placement not in AROUND_WEIGHTS:
            return False
        with torch.device("meta"):
            return self.build(Place("any", 8, 8)).mergeable

    def build(self, place: Place) -> RoutedParts:
        """Build the parts of one layer.

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
        self._check(
            self.schema_version <= SCHEMA_VERSION, "schema_version", f"at most {SCHEMA_VERSION}; upgrade peft-moe"
        )
        self._check(self.r >= 1, "r", "a rank of at least 1")
        self._check(self.num_experts is None or self.num_experts >= 1, "num_experts", "at least 1")
        self._check(self.lora_alpha > 0, "lora_alpha", "a positive number")
        for name in ("lora_dropout", "expert_dropout", "router_jitter_noise"):
            self._check(0 <= getattr(self, name) < 1, name, "a number from 0 up to, but not including, 1")
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            self._check(getattr(self, name) >= 0, name, "zero or a positive number")
        self._check(self.routed_scaling_factor > 0, "routed_scaling_factor", "a positive number")
        positive = "a positive number or None"
        self._check(self.capacity_factor is None or self.capacity_factor > 0, "capacity_factor", positive)
        self._check_choice("capacity_order", ("position", "choice"))
        self._check_choice("load_balancing_scope", SCOPES)
        self._check_choice("experts_implementation", tuple(IMPLEMENTATIONS))
        self._check_choice("init_weights", self.init_choices)
        if self.top_k is not None:
            hint = f"between 1 and num_experts={self.num_experts}"
            self._check(1 <= self.top_k <= self.num_experts, "top_k", hint)
        by_module = "None: experts are adapted as modules; name the modules in target_modules"
        self._check(not self.target_parameters, "target_parameters", by_module)
        self._check_choice("router", (*ROUTERS, BACKBONE))
        self._check(
            self.router != BACKBONE or self.placement in ("experts", "slices"),
            "router",
            f"one of {', '.join(map(repr, ROUTERS))}: only adapters around the backbone's experts follow its routing",
        )
        for name, reason in self.fixed_fields.items():
            self._check_left_alone(name, reason)
        taken = ROUTERS[self.router].fields if self.router in ROUTERS else ()
        for name in sorted(ROUTER_FIELDS - set(taken)):
            self._check_left_alone(name, f"the {self.router!r} router does not use it", of=MoeConfig)
        self._check("top_k" not in taken or self.top_k is not None, "top_k", f"set for the {self.router!r} router")
        if self.norm_topk_prob and self.top_k == 1 and self.num_experts > 1:
            warnings.warn(
                f"{type(self).__name__}: with top_k=1, norm_topk_prob=True makes every weight one, whatever the "
                "router says, so that it gets no gradient from the task. Write norm_topk_prob=False, or top_k=2.",
                MoePeftWarning,
                stacklevel=5,
            )
        if self.capacity_order == "choice" and self.task_type == "CAUSAL_LM":
            self._check(
                self.allow_non_causal,
                "capacity_order",
                "'position' for a causal language model: with 'choice' a later token takes an earlier token's place. "
                "To train with it all the same, set allow_non_causal=True",
            )

    def _check(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r} must be {expected}.")

    def _check_left_alone(self, name: str, reason: str, of: type[MoeConfig] | None = None) -> None:
        default = next(f for f in dataclasses.fields(of or type(self)) if f.name == name).default
        self._check(getattr(self, name) == default, name, f"left at {default!r}: {reason}")

    def _check_choice(self, name: str, choices: Sequence[object]) -> None:
        self._check(getattr(self, name) in choices, name, f"one of {', '.join(map(repr, choices))}")

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse the fields of another adapter type, which peft would load as that type without a word."""
        found = kwargs.get("peft_type")
        if cls.adapter_type and found is not None and str(found) != cls.adapter_type:
            raise ValueError(
                f"This adapter_config.json has peft_type={found!r}, but {cls.__name__} loads {cls.adapter_type!r}. "
                "Use peft.PeftConfig.from_pretrained, which picks the class by the file."
            )
        return super().check_kwargs(**kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MoeConfig:
        """Load a configuration, after checking that the weights beside it are complete; arguments as in peft.

        Raises:
            ValueError: The folder's weights are truncated, not safetensors, or do not fit the configuration.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        check_adapter_files(pretrained_model_name_or_path, subfolder, config.expected_shapes())
        return config

    def resolve(self, model: nn.Module, layers: Sequence[MoeLayer]) -> None:
        """Fill in and check what depends on the model, before any weight is changed.

        Args:
            model: The model to adapt.
            layers: Its sparse layers.
        """

    def adapts(self, layer: MoeLayer) -> bool:
        """Whether a sparse layer of the model gets an adapter by default."""
        return True

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """How the shapes of saved tensors begin, by the end of their names."""
        return {"_experts.A": (self.num_experts, self.r), "_experts.B": (self.num_experts, self.r)}

    def summary(self) -> str:
        """Experts and router in a few words, for the dry run."""
        experts = f"{self.num_experts} experts of rank {self.r}, router {self.router}"
        return experts if self.top_k is None else f"{experts}, top {self.top_k}"

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, and say in the folder's model card how to load the adapter; arguments as in peft."""
        super().save_pretrained(save_directory, **kwargs)
        write_section(save_directory, self.facts())

    def card_fields(self) -> list[str]:
        """Fields that a model card shows where they are set."""
        return list(SETTINGS)

    def facts(self) -> AdapterFacts:
        """What a model card can say about this adapter without its weights."""
        settings: dict[str, object] = {}
        for name in self.card_fields():
            value = getattr(self, name)
            if name not in self.fixed_fields and value not in (None, False, 0.0):
                settings[name] = sorted(value) if isinstance(value, set) else value
        return AdapterFacts(
            method=self.method,
            adapter_type=self.adapter_type,
            equation=self.equation,
            source=self.source,
            task_type=self.task_type,
            settings=settings,
            base_model=self.base_model_name_or_path,
        )
