"""A wrapped gated FFN: MixLoRA's sum of whole FFNs on models, frozen matrices run once, hooks, rows and precision."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.layers import RoutedFfn
from tests.contract.cases import randomize, tiny_olmoe
from tests.tiny import padded_batch, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

BATCH = padded_batch([9, 6])


def config(**fields) -> RoutedConfig:
    given = {"num_experts": 4, "top_k": 2, "norm_topk_prob": True, "r": 2, "router_aux_loss_coef": 0.0}
    return RoutedConfig(**{"task_type": "CAUSAL_LM", "wraps": "block", "experts": "ffn_lora", **given, **fields})


def adapted(model=None, **fields):
    model = get_peft_model(model or tiny_llama(), config(**fields)).eval()
    randomize(model)
    return model


def whole_ffn(layer, bank, e, x):
    """One expert: a copy of the FFN whose matrices have its pairs added."""
    ffn = copy.deepcopy(layer.base_layer)
    for name in ("gate", "up", "down"):
        pair = getattr(bank, f"{name}_A")[e].T @ getattr(bank, f"{name}_B")[e]
        getattr(ffn, f"{name}_proj").weight.data += config().scaling * pair.T
    return ffn(x)


def test_a_layer_is_the_sum_of_whole_ffns_that_the_router_chooses():
    layer = routed_layers(adapted().double())[0]
    x, bank = torch.randn(2, 5, 32).double(), layer.experts["default"]
    weights, chosen = (x @ layer.router["default"].weight.T).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    every = torch.stack([whole_ffn(layer, bank, e, x) for e in range(4)], 2)
    expected = (weights[..., None] * every.gather(2, chosen[..., None].expand(-1, -1, -1, 32))).sum(2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    assert isinstance(layer, RoutedFfn)


def test_any_leading_shape_gives_the_same_tokens():
    layer, x = routed_layers(adapted().double())[0], torch.randn(3, 5, 32).double()
    expected = layer(x)
    for given, wanted in ((x.reshape(-1, 32), expected.reshape(-1, 32)), (x[0, 0], expected[0, 0])):
        torch.testing.assert_close(layer(given), wanted)
    assert layer(x[:0]).shape == (0, 5, 32) and layer(x[:, :0]).shape == (3, 0, 32)


def test_the_frozen_matrices_run_once_and_hooks_of_the_ffn_fire():
    layer, calls = routed_layers(adapted())[0], []
    for name, module in layer.base_layer.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    expected = layer(torch.ones(2, 32))
    assert sorted(calls) == ["", "act_fn", "act_fn", "act_fn", "down_proj", "gate_proj", "up_proj"]
    layer.base_layer.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(layer(torch.ones(2, 32)), 2 * expected)


def test_without_a_gate_or_outside_of_an_ffn_it_is_refused_and_nothing_is_changed():
    for model, task in ((tiny_gpt2(), "CAUSAL_LM"), (tiny_bert(), "SEQ_CLS"), (tiny_olmoe(), "CAUSAL_LM")):
        before = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=r"no gated FFN, down\(act\(gate\(x\)\) \* up\(x\)\)"):
            get_peft_model(model, config(task_type=task))
        assert [type(module) for module in model.modules()] == before
    with pytest.raises(TypeError, match=r"self_attn .*not supported: experts that are copies of an FFN"):
        get_peft_model(tiny_llama(), config(target_modules=["self_attn"]))
    with pytest.raises(ValueError, match="wraps='linear' must be 'block' with the kind 'ffn_lora'"):
        config(wraps="linear")


def test_lora_on_attention_is_a_second_adapter_of_stock_peft():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    before = model(**BATCH).logits
    both = get_peft_model(model.base_model.model, config())
    assert torch.equal(both.eval()(**BATCH).logits, before)


def test_two_adapters_act_between_the_matrices_together_and_in_rows_of_their_own():
    model = adapted().double()
    model.add_adapter("other", config(num_experts=3))
    randomize(model, seed=2)
    layer, x = routed_layers(model)[0], torch.randn(2, 4, 32).double()
    model.base_model.set_adapter(["default", "other"])
    both = layer(x)
    model.set_adapter("default")
    alone = layer(x)
    ids = BATCH["input_ids"]
    own = [model(**BATCH).logits]
    model.set_adapter("other")
    own.append(model(**BATCH).logits)
    mixed = model(input_ids=ids, attention_mask=BATCH["attention_mask"], adapter_names=["default", "other"]).logits
    torch.testing.assert_close(mixed, torch.stack([own[0][0], own[1][1]]))
    assert not torch.allclose(both, alone)


def test_t5_trains_with_its_dropout_and_saves(tmp_path):
    model = get_peft_model(tiny_t5(dropout_rate=0.1), config(task_type="SEQ_2_SEQ_LM")).train()
    batch = {**BATCH, "labels": BATCH["input_ids"]}
    model(**batch).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    randomize(model)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_t5(dropout_rate=0.1), tmp_path).eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_it_does_not_merge():
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="merge"):
        model.merge_and_unload()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_in_16_bit_it_keeps_the_models_dtype_and_float32_scores():
    model = adapted(tiny_llama().bfloat16())
    layer = routed_layers(model)[0]
    out = layer(torch.randn(3, 32).bfloat16())
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()
    assert layer.router["default"].weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(adapted()(**BATCH).logits).all()
