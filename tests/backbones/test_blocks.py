"""Wrapped blocks pass through what the backbone does around them: recorded routers, noise, tuples, rows of a batch."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import set_seed

from moe_peft import PerftConfig
from moe_peft.layers import RoutedLayer
from tests.backbones.cases import BLOCK_CASES, adapted, base_model, batch_for, marked
from tests.backbones.models import tiny_model

# Type -> settings that multiply a block's input by noise in training, in place.
JITTER = {
    "dbrx": {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 6, "moe_top_k": 2, "hidden_size": 32}},
    "mixtral": {"router_jitter_noise": 0.3},
    "phimoe": {"input_jitter_noise": 0.3},
}
JITTER["dbrx"]["ffn_config"]["moe_jitter_eps"] = 0.3
TUPLES = ("gpt_oss", "llama4_text", "zaya")


@pytest.mark.parametrize(("model_type", "method"), BLOCK_CASES)
def test_output_router_logits_are_those_of_the_base_model(model_type, method):
    base, model = base_model(model_type), adapted(model_type, method, random=False)
    batch = batch_for(base)
    expected, found = (m(**batch, output_router_logits=True) for m in (base, model))
    names = [name for name in expected if "router_logits" in name]
    assert names and all(len(expected[name]) > 0 for name in names)
    for name in names:
        for got, wanted in zip(_tensors(found[name]), _tensors(expected[name]), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    if getattr(expected, "aux_loss", None) is not None:
        torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=1e-5, atol=1e-6)


def _tensors(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [t for entry in value for t in _tensors(entry)]


@pytest.mark.parametrize("model_type", [marked(model_type) for model_type in JITTER])
def test_noise_in_the_block_reaches_the_backbone_and_not_the_adapter(model_type):
    base = tiny_model(model_type, **JITTER[model_type]).requires_grad_(False).train()
    batch = batch_for(base)
    set_seed(3)
    expected = base(**batch).logits
    assert not torch.equal(base(**batch).logits, expected)
    model = get_peft_model(base, PerftConfig(variant="S", r=2, lora_dropout=0.0)).train()
    set_seed(3)
    assert torch.equal(model(**batch).logits, expected)

    layer = next(module for module in model.modules() if isinstance(module, RoutedLayer))
    layer.experts["default"].B.data.normal_()
    seen = {}
    layer.register_forward_pre_hook(lambda layer, args: seen.update(x=args[0].detach().clone()))
    layer.get_base_layer().register_forward_hook(lambda block, args, out: seen.update(base=_first(out)))
    layer.register_forward_hook(lambda layer, args, out: seen.update(out=_first(out)))
    model(**batch).loss.backward()
    bank = layer.experts["default"]
    added = bank.scaling * (seen["x"] @ bank.A[0].T) @ bank.B[0]
    torch.testing.assert_close(seen["out"] - seen["base"], added.view_as(seen["out"]), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(bank.A.grad).all() and bank.A.grad.any()


def _first(out):
    return (out[0] if isinstance(out, tuple) else out).detach().clone()


@pytest.mark.parametrize("model_type", TUPLES)
def test_what_a_block_returns_beside_its_output_is_passed_on(model_type):
    model = adapted(model_type, "perft-r")
    layer = next(module for module in model.modules() if isinstance(module, RoutedLayer))
    seen = []
    layer.get_base_layer().register_forward_hook(lambda block, args, out: seen.append(out))
    layer.register_forward_hook(lambda layer, args, out: seen.append(out))
    model(**batch_for(model))
    block, wrapped = seen
    assert isinstance(wrapped, tuple) and len(wrapped) == len(block) > 1
    assert wrapped[0].shape == block[0].shape and not torch.equal(wrapped[0], block[0])
    assert all(got is wanted for got, wanted in zip(wrapped[1:], block[1:], strict=True))


@pytest.mark.parametrize(("model_type", "method"), BLOCK_CASES)
def test_rows_of_a_batch_choose_their_adapter(model_type, method):
    base, model = base_model(model_type), adapted(model_type, method)
    batch = batch_for(base)
    if model_type == "gemma4_text":
        with pytest.raises(ValueError, match="cannot mix adapters in a batch"):
            model(**batch, adapter_names=["default", "__base__"])
        return
    mixed = model(**batch, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], model(**batch).logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], base(**batch).logits[1], rtol=1e-4, atol=1e-5)
