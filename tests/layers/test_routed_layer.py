"""Parts are called, not read: hooks fire once, weights that arrive with a call arrive, scores are float32."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import nn

from moe_peft import ExpertLoraConfig
from moe_peft.layers import RoutedLayer
from moe_peft.layers.shared_rows import is_plain
from moe_peft.routers import ConstantRouter, Router
from moe_peft.telemetry import record
from tests.contract.cases import METHODS, MODELS, groups_for, randomize, tiny_olmoe
from tests.slices import diagonal, sliced
from tests.tiny import padded_batch

CASES = [(model, method) for model in ("llama", "olmoe") for method in METHODS if MODELS[model].supports(method)]
IMPLEMENTATIONS = ("dense", "eager")


def every(turn: int):
    """All pairs; `make test` has every method on the sparse model, and some on the dense one."""
    return pytest.mark.parametrize(("model", "method"), sliced(CASES, diagonal(CASES, turn, whole=("olmoe",))))


def adapted(model, method, dtype=torch.float64, **fields):
    case = MODELS[model]
    config = case.config(method, **fields)
    torch.manual_seed(0)
    peft_model = get_peft_model(case.build(), config).eval().to(dtype)
    randomize(peft_model)
    batch = {name: value for name, value in case.batch().items() if name != "labels"}
    return peft_model, {**batch, **groups_for(config, batch)}


def parts_of(model) -> dict[str, nn.Module]:
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    return {
        f"{layer.place}.{kind}": bank["default"]
        for layer in layers
        for kind, bank in (("experts", layer.experts), ("router", layer.router))
        if "default" in bank
    }


def fields_of(model, method, implementation):
    try:
        MODELS[model].config(method, experts_implementation=implementation)
    except ValueError:  # a type without matrices
        return {} if implementation == "dense" else None
    return {"experts_implementation": implementation}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@every(0)
def test_hooks_on_routers_and_experts_fire_once_per_call_and_change_nothing(model, method, implementation):
    fields = fields_of(model, method, implementation)
    if fields is None:
        pytest.skip("no sum of matrices to compute")
    peft_model, batch = adapted(model, method, **fields)
    calls: dict[str, int] = {}
    with torch.no_grad():
        expected = peft_model(**batch).logits
        for name, part in parts_of(peft_model).items():
            part.register_forward_hook(lambda *args, name=name: calls.update({name: calls.get(name, 0) + 1}))
        torch.testing.assert_close(peft_model(**batch).logits, expected)
    assert calls == dict.fromkeys(parts_of(peft_model), 1)


@every(1)
def test_weights_that_a_call_brings_arrive(model, method):
    peft_model, batch = adapted(model, method)
    with torch.no_grad():
        expected = peft_model(**batch).logits
        for part in parts_of(peft_model).values():
            cpu_offload(part, torch.device("cpu"))
            assert not is_plain(part)
        torch.testing.assert_close(peft_model(**batch).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every(2)
def test_scores_are_float32_where_everything_has_been_cast_to_16_bit(model, method, dtype):
    peft_model, batch = adapted(model, method, torch.float32)
    for parameter in peft_model.parameters():
        parameter.data = parameter.data.to(dtype)
    inputs, logits = {}, {}
    for layer in (module for module in peft_model.modules() if isinstance(module, RoutedLayer)):
        for router in layer.router.values():
            router.register_forward_pre_hook(lambda m, args, place=layer.place: inputs.update({place: (m, args[0])}))
    with torch.no_grad(), record(peft_model) as hooked:
        peft_model(**batch)
    for layer in (module for module in peft_model.modules() if isinstance(module, RoutedLayer)):
        for router in layer.router.values():
            router._forward_pre_hooks.clear()
    with torch.no_grad(), record(peft_model) as plain:
        peft_model(**batch)
    for place, routings in plain.items():
        logits[place] = routings[0].logits
        assert logits[place].dtype == torch.float32 and torch.equal(logits[place], hooked[place][0].logits)
        if place in inputs and router_reads_linear(inputs[place][0]):
            router, x = inputs[place]
            assert torch.equal(logits[place], x.float() @ router.weight.float().T)


def router_reads_linear(router: Router) -> bool:
    return hasattr(router, "weight")


@pytest.mark.parametrize("method", ["routed", "perft-r", "mov"])
def test_scores_of_a_float32_input_are_not_rounded_by_autocast(method):
    peft_model, batch = adapted("llama", method, torch.float32)
    routers = [part for name, part in parts_of(peft_model).items() if name.endswith(".router")]
    seen = []
    for router in routers:
        router.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out.logits)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        peft_model(**batch)
    assert len(seen) == len(routers)
    for router, x, logits in seen:
        assert torch.equal(logits, x.float() @ router.weight.T)


def test_one_pair_beside_experts_decides_only_where_somebody_looks(monkeypatch):
    config = ExpertLoraConfig(r=2, target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(tiny_olmoe(), config).eval()
    batch, decided, own = padded_batch([5]), [], ConstantRouter.decide
    monkeypatch.setattr(ConstantRouter, "decide", lambda *args: (decided.append(1), own(*args))[1])
    plain = model(**batch).logits
    assert not decided
    with record(model) as seen:
        torch.testing.assert_close(model(**batch).logits, plain)
    assert len(decided) == sum("q_proj" in place for place in seen) > 0
