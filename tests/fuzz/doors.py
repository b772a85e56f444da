"""The entry points through which people put adapters on a model: peft's, and transformers' own."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from peft import PeftModel, get_peft_model
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from moe_peft.config.config import MoeConfig


class PeftDoor:
    """`get_peft_model` and the methods of `PeftModel`."""

    name = "peft"
    merges = True

    def add(self, model: nn.Module, config: MoeConfig, name: str) -> nn.Module:
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=name).eval()
        model.add_adapter(name, config)
        return model

    def activate(self, model: nn.Module, names: list[str]) -> None:
        if len(names) == 1:
            model.set_adapter(names[0])
        else:
            model.base_model.set_adapter(names)

    def active(self, model: nn.Module) -> list[str]:
        return list(model.active_adapters) if isinstance(model, PeftModel) else []

    def disabled(self, model: nn.Module) -> AbstractContextManager:
        return model.disable_adapter()

    def delete(self, model: nn.Module, name: str) -> None:
        others = [other for other in model.active_adapters if other != name]
        if others:
            model.set_adapter(others[0])  # peft's model would go on with the deleted one's configuration
            self.activate(model, others)
        model.delete_adapter(name)

    def save(self, model: nn.Module, folder: Path, name: str) -> Path:
        model.save_pretrained(folder, selected_adapters=[name])
        return folder if name == "default" else folder / name

    def load(self, model: nn.Module, folder: Path, name: str) -> nn.Module:
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=True).eval()
        model.load_adapter(folder, adapter_name=name, is_trainable=name in model.active_adapters)
        return model.eval()


class TransformersDoor:
    """`add_adapter`, `load_adapter` and the other adapter methods of `PreTrainedModel`."""

    name = "transformers"
    merges = False

    def add(self, model: nn.Module, config: MoeConfig, name: str) -> nn.Module:
        model.add_adapter(config, adapter_name=name)
        return model.eval()

    def activate(self, model: nn.Module, names: list[str]) -> None:
        model.set_adapter(names[0] if len(names) == 1 else names)

    def active(self, model: nn.Module) -> list[str]:
        return list(model.active_adapters()) if getattr(model, "_hf_peft_config_loaded", False) else []

    @contextmanager
    def disabled(self, model: nn.Module):
        model.disable_adapters()
        try:
            yield
        finally:
            model.enable_adapters()
            for module in model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.enable_adapters(True)  # transformers leaves them off, those of stock adapters too

    def delete(self, model: nn.Module, name: str) -> None:
        model.delete_adapter(name)

    def save(self, model: nn.Module, folder: Path, name: str) -> Path:
        active = self.active(model)
        self.activate(model, [name])
        model.save_pretrained(folder)
        self.activate(model, active)
        return folder

    def load(self, model: nn.Module, folder: Path, name: str) -> nn.Module:
        model.load_adapter(str(folder), adapter_name=name)
        return model.eval()


DOORS = {door.name: door for door in (PeftDoor(), TransformersDoor())}
