"""What every adapter type promises on every architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from tests.contract.cases import METHODS, MODELS, adapter_parameters, groups_for, randomize
from tests.slices import diagonal, sliced

CASES = [(model, method) for model in MODELS for method in METHODS if MODELS[model].supports(method)]
CAUSAL_CASES = [(model, method) for model, method in CASES if MODELS[model].causal]
GENERATING_CASES = [(model, method) for model, method in CASES if model != "bert"]


def every(cases, turn: int):
    """All pairs; `make test` has every method on the model that takes all of them, and some on each of the others."""
    return pytest.mark.parametrize(("model_name", "method"), sliced(cases, diagonal(cases, turn, whole=("olmoe",))))


def adapted(model_name: str, method: str, *, random: bool = True, double: bool = False, **overrides):
    """An adapted model in eval mode, its base model's twin, a batch, and the adapter's configuration."""
    case = MODELS[model_name]
    # torch picks another GEMM for weights that require gradients, so the base is frozen as peft freezes it.
    base = case.build().eval().requires_grad_(False)
    config = case.config(method, **overrides)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    if random:
        randomize(model)
    if double:
        model.double()
    return model, base, case.batch(), config


@every(CASES, 0)
def test_step_zero_output_is_the_base_output_bit_for_bit(model_name, method):
    model, base, batch, config = adapted(model_name, method, random=False)
    # Pairs inside the experts are computed with them, whose own loop rounds otherwise.
    tolerance = 1e-6 if method.startswith("expert-lora") else 0.0
    torch.testing.assert_close(model(**batch).logits, base(**batch).logits, rtol=0, atol=tolerance)
    model.train(), base.train()
    found = model(**batch, **groups_for(config, batch)).logits
    torch.testing.assert_close(found, base(**batch).logits, rtol=0, atol=tolerance)


@every(CASES, 1)
def test_only_adapter_parameters_train(model_name, method):
    model, _, batch, config = adapted(model_name, method)
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model(**batch, **groups_for(config, batch)).loss.backward()
    optimizer.step()
    prefix = model.base_model.prefix
    for name, parameter in model.named_parameters():
        is_adapter = f".{prefix}" in name
        assert parameter.requires_grad == is_adapter or "modules_to_save" in name, name
        if is_adapter:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert not torch.equal(parameter, before[name]), name
        elif "modules_to_save" not in name:
            assert torch.equal(parameter, before[name]), name


@every(CASES, 2)
def test_save_and_load_are_equal_to_the_last_bit(model_name, method, tmp_path):
    model, base, batch, _ = adapted(model_name, method)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    for kwargs in ({}, {"adapter_name": "other"}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **kwargs).eval()
        assert torch.equal(loaded(**batch).logits, expected)
        for name, parameter in loaded.named_parameters():
            assert parameter.device.type != "meta", name


@every(CASES, 3)
def test_two_adapters_switch_and_disable(model_name, method):
    model, base, batch, config = adapted(model_name, method)
    first = model(**batch).logits
    model.add_adapter("second", copy.deepcopy(config))
    assert torch.equal(model(**batch).logits, first)
    randomize(model, seed=2)
    first = model(**batch).logits
    model.set_adapter("second")
    second = model(**batch).logits
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert torch.equal(model(**batch).logits, second)
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, first)
    model.delete_adapter("second")
    assert torch.equal(model(**batch).logits, first)
    unloaded = model.unload()
    assert torch.equal(unloaded(**batch).logits, base(**batch).logits)
    assert {name for name, _ in unloaded.named_modules()} == {name for name, _ in base.named_modules()}


@pytest.mark.parametrize("use_reentrant", [False, True])
@every(CASES, 4)
def test_checkpointing_gradients_equal_those_without(model_name, method, use_reentrant):
    model, _, batch, config = adapted(model_name, method, double=True)
    model.train()
    extra = groups_for(config, batch)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch, **extra).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: name + text
        )


@every(CASES, 5)
def test_sixteen_bit_base_gives_sixteen_bit_output_and_keeps_float32_routers(model_name, method):
    case = MODELS[model_name]
    base = case.build().to(torch.bfloat16).eval()
    for autocast_adapter_dtype in (True, False):
        config = case.config(method)
        model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=autocast_adapter_dtype)
        randomize(model)
        routers, experts = (adapter_parameters(model, kind).values() for kind in ("router", "experts"))
        assert {p.dtype for p in routers} <= {torch.float32}
        # Vectors are near one, where 16 bit has no room for what they learn.
        keeps = autocast_adapter_dtype or method.startswith("mov")
        assert {p.dtype for p in experts} == {torch.float32 if keeps else torch.bfloat16}
        batch = case.batch()
        output = model.train()(**batch, **groups_for(config, batch))
        assert output.logits.dtype == torch.bfloat16
        output.loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in routers)
    model.to(torch.bfloat16)
    assert {p.dtype for p in adapter_parameters(model, "router").values()} <= {torch.float32}


@every(CASES, 6)
def test_autocast_output_is_close_to_float32(model_name, method):
    model, _, batch, config = adapted(model_name, method)
    for parameter in adapter_parameters(model, "experts").values():
        parameter.data *= 0.2
    expected = model(**batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.train()(**batch, **groups_for(config, batch))
        found = model.eval()(**batch).logits
    assert (found.float() - expected).norm() < 0.25 * expected.norm()  # rounding may flip a top-k
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("training", [False, True])
@every(CAUSAL_CASES, 7)
def test_later_tokens_and_other_rows_change_nothing_earlier(model_name, method, training):
    model, _, batch, config = adapted(model_name, method, double=True)
    model.train(training)
    extra = groups_for(config, batch)
    ids, mask = batch["input_ids"], torch.ones_like(batch["input_ids"])
    before = model(input_ids=ids, attention_mask=mask, **extra).logits
    changed = ids.clone()
    changed[0, 5:] = (changed[0, 5:] + 7) % 61 + 3
    after = model(input_ids=changed, attention_mask=mask, **extra).logits
    torch.testing.assert_close(after[0, :5], before[0, :5], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1:], before[1:], rtol=0, atol=1e-12)
    assert not torch.allclose(after[0, 5:], before[0, 5:], atol=1e-3)


@every(CAUSAL_CASES, 8)
def test_decoding_with_cache_equals_the_full_forward(model_name, method):
    model, _, batch, _ = adapted(model_name, method, double=True)
    ids = batch["input_ids"]
    full = model(input_ids=ids).logits
    cache, steps = None, []
    for position in range(ids.shape[1]):
        output = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    atol = MODELS[model_name].decoding_error
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-9, atol=atol)


@every(GENERATING_CASES, 9)
def test_generation_with_cache_equals_generation_without(model_name, method):
    model, _, batch, _ = adapted(model_name, method)
    inputs = {name: batch[name][:1] for name in ("input_ids", "attention_mask")}
    outputs = [
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    ]
    assert torch.equal(*outputs)
