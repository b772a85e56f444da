"""Every pair of registered parts beside a layer that bitsandbytes keeps in four bits, and every part in a model."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from moe_peft import routed_layers, router_loss
from moe_peft.extend import EXPERTS
from tests.contract.cases import randomize
from tests.tiny import tiny_llama

from .cases import PARTS, PLACED, batch_for, config_of, context, on_layers, on_pairs, parts_of
from .combinations import losses_for, placed

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.bnb
WIDTH = 64


class FourBit(nn.Module):
    """A model that is a single linear layer in four bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = bitsandbytes.nn.Linear4bit(
            WIDTH, WIDTH, bias=False, quant_type="nf4", compute_dtype=torch.float32
        )
        self.to("cpu")

    def forward(self, x):
        return self.linear(x)


@on_pairs(7)
def test_a_layer_in_four_bits_starts_as_it_was_and_trains_in_float32(choice):
    base, x_TD = FourBit().requires_grad_(False), torch.randn(12, WIDTH)
    assert base.linear.weight.quant_state is not None
    expected, packed = base(x_TD), base.linear.weight.clone()
    (layer,) = routed_layers(get_peft_model(base, config_of(choice, losses=False, target_modules=["linear"])))
    found = layer.add("default", x_TD, expected.clone(), context())
    assert torch.equal(found, expected), "the tensors in `up` start at zero and add exactly nothing"
    assert {p.dtype for part in parts_of(layer) for p in part.parameters()} <= {torch.float32}
    randomize(layer)
    layer.add("default", x_TD, expected.clone(), context(training=True)).square().sum().backward()
    for part in parts_of(layer):
        for name, parameter in part.named_parameters():
            where = f"{type(part).__name__}.{name}"
            assert (parameter.grad is not None) == (name not in part.frozen), where
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), where
    assert torch.equal(layer.base_layer.weight, packed)


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=WIDTH, intermediate_size=128).save_pretrained(folder)
    return folder


def four_bit_model(folder):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32).eval()


@on_layers([*PARTS[:2], *placed()], PARTS)
def test_a_model_in_four_bits_starts_as_it_was_trains_and_comes_back(choice, saved_base, tmp_path):
    batch, base = batch_for("llama", choice, labels=True), four_bit_model(saved_base).requires_grad_(False)
    known = {key: value for key, value in batch.items() if key not in ("labels", "task_type")}
    with torch.no_grad():
        expected = base(**known).logits
    base = prepare_model_for_kbit_training(base)
    kind = EXPERTS[choice[3]].placement
    where = {"target_modules": ["q_proj", "down_proj"]} if kind is None else PLACED[kind][1]
    model = get_peft_model(base, config_of(choice, task_type="CAUSAL_LM", **where))
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    randomize(model)
    model.train()(**batch).loss.backward()
    assert bool(router_loss(model) != 0) == bool(losses_for(choice))
    for part in parts_of(model):
        for name, parameter in part.named_parameters():
            where = f"{type(part).__name__}.{name}"
            assert parameter.dtype == torch.float32, where
            assert (parameter.grad is not None) == (name not in part.frozen), where
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), where
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(prepare_model_for_kbit_training(four_bit_model(saved_base)), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    for own, loaded in zip(parts_of(model), parts_of(again), strict=True):
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in own.state_dict().items())
