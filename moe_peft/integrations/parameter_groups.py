"""Learning rates of their own for routers, and for the experts' up matrices (LoRA+), in any trainer's optimizer.

LoRA+ (Hayou et al., 2024, arXiv 2402.12354) trains B with a larger learning rate than A; a ratio of 16 is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..messages import shown
from ..part import ModulePart
from ..routers import Router
from .checks import is_number


@dataclass(frozen=True)
class Rates:
    """Learning rates that differ from the trainer's.

    Attributes:
        router_lr: Learning rate of the routers; None for the trainer's.
        expert_lr: Learning rate of the experts; None for the trainer's.
        lora_plus_ratio: Learning rate of the experts' up matrices over that of the experts; None for one.
    """

    router_lr: float | None = None
    expert_lr: float | None = None
    lora_plus_ratio: float | None = None

    def given(self) -> dict[str, float]:
        """Those that are set, by name."""
        names = ("router_lr", "expert_lr", "lora_plus_ratio")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def over(self, before: Rates) -> Rates:
        """These rates, and those of `before` where these leave one out."""
        return Rates(**{**before.given(), **self.given()})


class OptimizerFactory:
    """Makes the optimizer of a trainer when the trainer asks for it, with groups split by learning rate too.

    Which parameters decay is the trainer's choice. Parameters are told apart when the optimizer is made, as sharding
    may have replaced them by then.

    Args:
        trainer: The trainer.
        optimizer_cls: Class of the optimizer.
        rates: Learning rates of our parameters' own.
    """

    def __init__(self, trainer: Any, optimizer_cls: type, rates: Rates) -> None:
        self.trainer = trainer
        self.optimizer_cls = optimizer_cls
        self.rates = rates

    def __call__(self) -> Callable[..., torch.optim.Optimizer]:
        """The function that makes the optimizer; the trainer takes anything but a class for a factory of such."""
        return self.make

    def make(self, model: nn.Module, *, lr: float, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer.

        Args:
            model: The model, as it is wrapped by then.
            lr: The trainer's learning rate.
            **kwargs: Further arguments of the optimizer's class, from the trainer.
        """
        rates, decaying = self.learning_rates(model, lr), set(self.trainer.get_decay_parameter_names(model))
        groups: dict[tuple[bool, float], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            decays, rate = name in decaying, rates.get(id(parameter), lr)
            weight_decay = self.trainer.args.weight_decay if decays else 0.0
            group = groups.setdefault((decays, rate), {"params": [], "lr": rate, "weight_decay": weight_decay})
            group["params"].append(parameter)
        return self.optimizer_cls(list(groups.values()), lr=lr, **kwargs)

    def learning_rates(self, model: nn.Module, lr: float) -> dict[int, float]:
        """Learning rate by id of those parameters that have another than the trainer's."""
        rates: dict[int, float] = {}
        if self.rates.router_lr is not None:
            rates.update({id(parameter): self.rates.router_lr for parameter in routers_of(model)})
        expert_lr = lr if self.rates.expert_lr is None else self.rates.expert_lr
        if self.rates.expert_lr is not None:
            rates.update({id(parameter): expert_lr for parameter in experts_of(model)})
        if self.rates.lora_plus_ratio is not None:
            ratio = self.rates.lora_plus_ratio
            rates.update({id(parameter): expert_lr * ratio for parameter in up_matrices_of(model)})
        return rates

    def __repr__(self) -> str:
        # The trainer looks for "bitsandbytes" in the text of the class.
        return f"{type(self).__name__}({self.optimizer_cls})"


def routers_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of all routers that learn."""
    for module in model.modules():
        if isinstance(module, Router) and module.learns:
            yield from module.parameters()


def experts_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of all banks of experts that train."""
    for module in model.modules():
        if isinstance(module, ModulePart) and not isinstance(module, Router):
            yield from (p for name, p in module.named_parameters() if name not in module.frozen)


def up_matrices_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of all experts that carry their result out."""
    for module in model.modules():
        if isinstance(module, ModulePart):
            yield from (getattr(module, name) for name in module.up)


PARTS = {
    "router_lr": (routers_of, "router that learns"),
    "expert_lr": (experts_of, "experts that train"),
    "lora_plus_ratio": (up_matrices_of, "low-rank experts, with matrices A and B"),
}


def check_rates(trainer: Any, rates: Rates) -> None:
    """Refuse learning rates that a trainer would not train with.

    Args:
        trainer: The trainer.
        rates: Learning rates of our parameters' own.

    Raises:
        ValueError: A value is not positive or fits no parameter, or the trainer's optimizer is not its own to make.
    """
    given = rates.given()
    for name, value in given.items():
        if not is_number(value) or not value > 0:
            raise ValueError(f"attach: {name}={shown(value)} must be a positive number, or None to leave it alone.")
    for name, value in given.items():
        find, part = PARTS[name]
        if next(find(trainer.model), None) is None:
            raise ValueError(f"attach: {name}={value} fits no parameter: the adapter has no {part}. Leave it out.")
    if rates_of(trainer).given().items() >= given.items():
        return
    if trainer.optimizer is not None:
        raise ValueError(
            f"attach: {given} come too late, as the trainer has its optimizer already. Call attach before "
            "trainer.train(), and do not give the trainer `optimizers=`; or give those parameter groups of their own."
        )
    if trainer.args.deepspeed and "optimizer" in _deepspeed_config(trainer.args):
        raise ValueError(
            f"attach: {given} have no effect on the optimizer that the DeepSpeed configuration defines. Remove its "
            "'optimizer' section, so that the trainer makes the optimizer."
        )
    optimizer_cls, kwargs = _optimizer_of(trainer)
    own = [name for name in ("params", "model", "optimizer_dict") if name in kwargs]
    if own or not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise ValueError(
            f"attach: {given} do not go with optim={trainer.args.optim!s}, which groups the parameters itself. "
            "Choose another, as optim='adamw_torch', or leave them out."
        )


def set_learning_rates(trainer: Any, rates: Rates) -> None:
    """Let a trainer make its optimizer with learning rates of our parameters' own.

    Args:
        trainer: A trainer that `check_rates` has accepted.
        rates: The rates; what they leave out stays as it was set before.
    """
    before = rates_of(trainer)
    if rates.over(before) == before:
        return
    optimizer_cls, kwargs = _optimizer_of(trainer)
    trainer.optimizer_cls_and_kwargs = (OptimizerFactory(trainer, optimizer_cls, rates.over(before)), kwargs)


def rates_of(trainer: Any) -> Rates:
    """The rates that have been set for a trainer's optimizer."""
    factory = (trainer.optimizer_cls_and_kwargs or (None,))[0]
    return factory.rates if isinstance(factory, OptimizerFactory) else Rates()


def _optimizer_of(trainer: Any) -> tuple[Any, dict[str, Any]]:
    """Class and arguments of the optimizer that a trainer is to make."""
    optimizer_cls, kwargs = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(
        trainer.args, trainer.model
    )
    return (optimizer_cls.optimizer_cls if isinstance(optimizer_cls, OptimizerFactory) else optimizer_cls), kwargs


def _deepspeed_config(args: Any) -> dict[str, Any]:
    plugin = getattr(args, "hf_deepspeed_config", None)
    return plugin.config if plugin is not None else {}
