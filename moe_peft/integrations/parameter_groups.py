"""Learning rates of their own for routers, and for the experts' up matrices (LoRA+), in any trainer's optimizer.

LoRA+ (Hayou et al., 2024, arXiv 2402.12354) trains B with a larger learning rate than A; a ratio of 16 is theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..experts import LowRankExperts
from ..routers import LinearRouter


class OptimizerFactory:
    """Makes the optimizer of a trainer when the trainer asks for it, with groups split by learning rate too.

    Which parameters decay is the trainer's choice. Parameters are told apart when the optimizer is made, as sharding
    may have replaced them by then.

    Args:
        trainer: The trainer.
        optimizer_cls: Class of the optimizer.
        router_lr: Learning rate of the routers; None for the trainer's.
        lora_plus_ratio: Learning rate of the experts' up matrices over the trainer's; None for one.
    """

    def __init__(
        self, trainer: Any, optimizer_cls: type, *, router_lr: float | None, lora_plus_ratio: float | None
    ) -> None:
        self.trainer = trainer
        self.optimizer_cls = optimizer_cls
        self.router_lr = router_lr
        self.lora_plus_ratio = lora_plus_ratio

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
        for module in model.modules():
            if isinstance(module, LinearRouter) and self.router_lr is not None:
                rates.update({id(parameter): self.router_lr for parameter in module.parameters()})
            elif isinstance(module, LowRankExperts) and self.lora_plus_ratio is not None:
                rates[id(module.B)] = lr * self.lora_plus_ratio
        return rates

    def __repr__(self) -> str:
        # The trainer looks for "bitsandbytes" in the text of the class.
        return f"{type(self).__name__}({self.optimizer_cls})"


def set_learning_rates(trainer: Any, router_lr: float | None, lora_plus_ratio: float | None) -> None:
    """Let a trainer make its optimizer with learning rates of our parameters' own.

    Args:
        trainer: A trainer that has not made its optimizer yet.
        router_lr: Learning rate of the routers; None for the trainer's.
        lora_plus_ratio: Learning rate of the experts' up matrices over the trainer's; None for one.

    Raises:
        ValueError: A value is not positive or fits no parameter, or the trainer's optimizer is not its own to make.
    """
    values = {"router_lr": router_lr, "lora_plus_ratio": lora_plus_ratio}
    wanted = {name: value for name, value in values.items() if value is not None}
    if not wanted:
        return
    for name, value in wanted.items():
        if not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"attach: {name}={value!r} must be a positive number, or None to leave it alone.")
    if trainer.optimizer is not None:
        raise ValueError(
            f"attach: {wanted} come too late, as the trainer has its optimizer already. Call attach before "
            "trainer.train(), and do not give the trainer `optimizers=`; or give those parameter groups of their own."
        )
    if trainer.args.deepspeed and "optimizer" in _deepspeed_config(trainer.args):
        raise ValueError(
            f"attach: {wanted} have no effect on the optimizer that the DeepSpeed configuration defines. Remove its "
            "'optimizer' section, so that the trainer makes the optimizer."
        )
    known = (LinearRouter,) if lora_plus_ratio is None else (LowRankExperts,)
    if not any(isinstance(module, known) for module in trainer.model.modules()):
        raise ValueError(f"attach: {wanted} fit no parameter: the adapter has no {known[0].__name__}.")
    optimizer_cls, kwargs = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(
        trainer.args, trainer.model
    )
    if isinstance(optimizer_cls, OptimizerFactory):
        optimizer_cls = optimizer_cls.optimizer_cls
    own = [name for name in ("params", "model", "optimizer_dict") if name in kwargs]
    if own or not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise ValueError(
            f"attach: {wanted} do not go with optim={trainer.args.optim!s}, which groups the parameters itself. "
            "Choose another, as optim='adamw_torch', or leave them out."
        )
    factory = OptimizerFactory(trainer, optimizer_cls, router_lr=router_lr, lora_plus_ratio=lora_plus_ratio)
    trainer.optimizer_cls_and_kwargs = (factory, kwargs)


def _deepspeed_config(args: Any) -> dict[str, Any]:
    plugin = getattr(args, "hf_deepspeed_config", None)
    return plugin.config if plugin is not None else {}
