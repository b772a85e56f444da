"""Ctrl-C while an adapter is loaded, saved or merged leaves the model, and what lay in the folder, as it was."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from moe_peft import EsftConfig, LoraMoeConfig, MovConfig
from tests.contract.cases import randomize, tiny_olmoe
from tests.tiny import padded_batch, tiny_llama

TYPES = {
    "loramoe": (tiny_llama, lambda: LoraMoeConfig(num_experts=3, r=2)),
    "mov": (tiny_llama, lambda: MovConfig(num_experts=3)),
    "esft": (tiny_olmoe, lambda: EsftConfig(experts={"0": [1], "1": [0, 2]})),
}
every_type = pytest.mark.parametrize("kind", TYPES)


def adapted(kind):
    build, config = TYPES[kind]
    model = get_peft_model(build(), config()).eval()
    randomize(model)
    return model


def logits(model):
    with torch.no_grad():
        return model(**padded_batch([5, 3])).logits


def interrupting(monkeypatch, owner, name, after):
    """Let a call end in Ctrl-C: before it does anything, or when it is done."""
    plain = getattr(owner, name)

    def interrupted(*args, **kwargs):
        if after:
            plain(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)


def state_of(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [(name, type(module)) for name, module in model.named_modules()], hooks


@every_type
@pytest.mark.parametrize("after", [False, True])
def test_a_base_is_bare_again_and_a_model_has_the_adapters_that_it_had(kind, after, tmp_path, monkeypatch):
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    base = TYPES[kind][0]().eval()
    bare, expected = state_of(base), logits(base)
    before, own = state_of(model), logits(model)
    with monkeypatch.context() as patch:
        interrupting(patch, nn.Module, "load_state_dict", after)
        with pytest.raises(KeyboardInterrupt):
            PeftModel.from_pretrained(base, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            model.load_adapter(tmp_path, "other")
    assert state_of(base) == bare and torch.equal(logits(base), expected) and not hasattr(base, "peft_config")
    assert state_of(model) == before and torch.equal(logits(model), own) and list(model.peft_config) == ["default"]
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path).eval()), own)
    torch.testing.assert_close(logits(model), own)


@every_type
def test_a_folder_keeps_the_adapter_that_was_in_it(kind, tmp_path, monkeypatch):
    model = adapted(kind)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    randomize(model, seed=5)
    with monkeypatch.context() as patch:
        interrupting(patch, PeftModel, "create_or_update_model_card", False)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == weights
    loaded = PeftModel.from_pretrained(TYPES[kind][0](), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected)


@pytest.mark.parametrize("kind", ["esft"])
def test_a_merge_is_whole_or_none(kind, monkeypatch):
    model = adapted(kind)
    before, expected = state_of(model), logits(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = [m for m in model.modules() if hasattr(m, "merged_adapters")]
    with monkeypatch.context() as patch:
        interrupting(patch, type(layers[-1]), "merge", True)
        with pytest.raises(KeyboardInterrupt):
            model.merge_and_unload()
    assert state_of(model) == before and not any(layer.merged_adapters for layer in layers)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), expected)
