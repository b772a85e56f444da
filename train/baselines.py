"""Methods that are not ours, to compare with: stock LoRA, and the training of every weight.

    lora:  y = W0 x + (alpha / r) B A x        Hu et al., 2021, arXiv 2106.09685
    none:  y = W x

A baseline answers what the scripts ask of an adapter's configuration, in the same words; what the trainer gets is
stock peft's `LoraConfig`, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import moe_peft
from moe_peft.backbone.sizes import num_base_weights
from moe_peft.config.checked import CheckedConfig
from moe_peft.place import Place
from moe_peft.tables import table

# Those of TRL's own scripts.
RANK, DROPOUT = 16, 0.05


@dataclass(frozen=True)
class BaselineDescription:
    """What a baseline would train; printed and read as `moe_peft.describe`'s.

    Attributes:
        config: The baseline.
        places: The layers with an adapter.
        parameters: Trainable parameters at each of them.
        base_parameters: Parameters of the model.
        num_parameters: Trainable parameters of all.
    """

    config: Baseline
    places: list[Place]
    parameters: list[int]
    base_parameters: int
    num_parameters: int

    def __str__(self) -> str:
        """One line per place, then the total."""
        rows = [("place", "layer", "in -> out", "trainable")]
        for place, count in zip(self.places, self.parameters, strict=True):
            rows.append((place.name, place.kind, f"{place.in_features} -> {place.out_features}", f"{count:,}"))
        share = 100 * self.num_parameters / max(self.base_parameters, 1)
        total = (
            f"{self.config.method}: {self.config.summary()}; {len(self.places)} places, {self.num_parameters:,} "
            f"trainable parameters ({share:.2f}% of the base model's {self.base_parameters:,})"
        )
        return "\n".join([table(rows), total]) if self.places else total


@dataclass
class Baseline(CheckedConfig):
    """Base of the baselines.

    Attributes:
        method: Name of the method.
        equation: What it computes, in plain text.
        source: Its paper, or where its defaults are from.
        default_learning_rate: Rate of AdamW in supervised fine-tuning where nobody says one.
        mergeable: Whether it computes the same for every input.
    """

    method: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    source: ClassVar[str] = ""
    default_learning_rate: ClassVar[float] = 2e-4
    mergeable: ClassVar[bool] = True

    def adapter(self) -> LoraConfig | None:
        """What the trainer gets as its `peft_config`."""
        raise NotImplementedError

    def describe(self, model: nn.Module) -> BaselineDescription:
        """Tell what would be trained.

        Args:
            model: The model on the meta device; it is not changed.

        Raises:
            ValueError: Nothing matches.
        """
        raise NotImplementedError

    def summary(self) -> str:
        """The size in a few words."""
        raise NotImplementedError

    def check_loading(self, model_args: Any) -> None:
        """Refuse ways of loading the model in which the baseline cannot train it.

        Args:
            model_args: TRL's `ModelConfig`.

        Raises:
            ValueError: There is one.
        """


@dataclass
class PlainLora(Baseline):
    """Stock LoRA; the defaults are those of TRL's scripts, on every linear layer."""

    method: ClassVar[str] = "LoRA"
    equation: ClassVar[str] = "y = W0 x + (alpha / r) B A x"
    source: ClassVar[str] = "arXiv 2106.09685"

    r: int = field(default=RANK, metadata={"help": "Rank."})
    lora_alpha: float | None = field(default=None, metadata={"help": "B A x is times lora_alpha / r; None: 2 r."})
    lora_dropout: float = field(default=DROPOUT, metadata={"help": "Dropout on the input of A."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    init_weights: bool | str = field(default=True, metadata={"help": "peft's init_lora_weights."})
    target_modules: list[str] | str = field(default="all-linear", metadata={"help": "Layers to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Decoder layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Where they are counted."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full beside."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained."}
    )

    def __post_init__(self) -> None:
        self._check_types()
        super().__post_init__()
        self._check(self.r >= 1, "r", "a rank of at least 1")
        self._check(0 <= self.lora_dropout < 1, "lora_dropout", "a number from 0 up to, but not including, 1")
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        self._check(self.lora_alpha > 0, "lora_alpha", "a positive number")

    def adapter(self) -> LoraConfig:
        """See `Baseline.adapter`."""
        return LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # a number as any other to peft
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            init_lora_weights=self.init_weights,  # type: ignore[arg-type]
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            modules_to_save=self.modules_to_save,
            trainable_token_indices=self.trainable_token_indices,
            task_type=self.task_type,
            revision=self.revision,
        )

    def summary(self) -> str:
        """See `Baseline.summary`."""
        return f"rank {self.r}"

    def describe(self, model: nn.Module) -> BaselineDescription:
        """See `Baseline.describe`."""
        base_parameters = num_base_weights(model)
        config = self.adapter()
        config.modules_to_save = config.trainable_token_indices = None
        with torch.device("meta"):
            adapted = get_peft_model(model, config)  # type: ignore[arg-type]
        places, parameters = [], []
        for name, layer in adapted.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                kind = type(layer.get_base_layer()).__name__
                places.append(Place(name, layer.in_features, layer.out_features, kind))
                parameters.append(sum(p.numel() for p in layer.parameters() if p.requires_grad))
        adapted.unload()
        return BaselineDescription(self, places, parameters, base_parameters, sum(parameters))


@dataclass
class NoAdapter(Baseline):
    """No adapter: every weight of the model is trained, as TRL does without a `peft_config`."""

    method: ClassVar[str] = "Full fine-tuning"
    equation: ClassVar[str] = "y = W x"
    source: ClassVar[str] = "the learning rate is the default of TRL's SFTConfig"
    default_learning_rate: ClassVar[float] = 2e-5
    modules_to_save: ClassVar[None] = None
    trainable_token_indices: ClassVar[None] = None

    def adapter(self) -> None:
        """See `Baseline.adapter`."""

    def summary(self) -> str:
        """See `Baseline.summary`."""
        return "every weight"

    def describe(self, model: nn.Module) -> BaselineDescription:
        """See `Baseline.describe`."""
        count = num_base_weights(model)
        return BaselineDescription(self, [], [], count, count)

    def check_loading(self, model_args: Any) -> None:
        """See `Baseline.check_loading`."""
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(model_args, name, False):
                raise ValueError(
                    f"--{name} true packs the weights, and --moe_method none trains them, which packed ones cannot "
                    f"be. Write --{name} false, or --moe_method lora."
                )


# What `--moe_method` takes beside our adapter types.
BASELINES: dict[str, type[Baseline]] = {"lora": PlainLora, "none": NoAdapter}


def check_flags(moe_args: Any) -> None:
    """Refuse flags about parts that a baseline does not have.

    Args:
        moe_args: The adapter's flags.

    Raises:
        ValueError: There is one.
    """
    method = moe_args.moe_method
    if method not in BASELINES:
        return
    for name in ("moe_router_lr", "moe_lora_plus_ratio"):
        if getattr(moe_args, name) is not None:
            raise ValueError(
                f"--{name} {getattr(moe_args, name)} has no meaning for --moe_method {method}; remove it."
            )
    if getattr(moe_args, "moe_report", False) and BASELINES[method]().adapter() is None:
        raise ValueError(
            f"--moe_report true loads the saved adapter again, and --moe_method {method} has none. Write --moe_report "
            "false; `--eval_strategy steps --eval_on_start true` prints the held-out loss before and after."
        )


def adapter_of(config: Any) -> Any:
    """What a trainer gets as its `peft_config`.

    Args:
        config: Of an adapter of ours, or a baseline.
    """
    return config.adapter() if isinstance(config, Baseline) else config


def describe(model: nn.Module, config: Any) -> Any:
    """`moe_peft.describe` for baselines too.

    Args:
        model: The model on the meta device.
        config: Of an adapter of ours, or a baseline.
    """
    return config.describe(model) if isinstance(config, Baseline) else moe_peft.describe(model, config)
