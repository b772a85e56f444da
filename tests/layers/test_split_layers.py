"""Adapters of a model whose experts are shared out, in a group of one process: all that a whole adapter does."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.tensor import DTensor

from moe_peft import EsftConfig, ExpertLoraConfig, MoePeftWarning, PerftConfig, RoutedConfig, routed_layers, telemetry
from tests.contract.cases import tiny_olmoe
from tests.shared_experts import group_of_one, shared_out
from tests.tiny import padded_batch

EXPERTS = {"0": [1], "1": [0, 3]}
CONFIGS = {
    "perft-e": lambda: PerftConfig(variant="E", r=2, lora_dropout=0.0),
    "esft": lambda: EsftConfig(experts=EXPERTS),
    "esft-lora": lambda: EsftConfig(experts=EXPERTS, expert_adapter="lora", r=2),
    "expert-lora": lambda: ExpertLoraConfig(r=2),
    "expert-lora-selected": lambda: ExpertLoraConfig(r=2, experts=EXPERTS),
    "bottleneck": lambda: PerftConfig(variant="E", r=2, lora_dropout=0.0, experts="bottleneck"),
    "routed": lambda: RoutedConfig(wraps="experts", router="backbone", r=2, router_aux_loss_coef=0.0),
}


def of_kind(**fields):
    return RoutedConfig(wraps="experts", router="backbone", r=2, router_aux_loss_coef=0.0, **fields)


# Adapters that every process holds whole: with routers of their own, and of experts that are more than a row each.
WHOLE = {
    "perft-r": lambda: PerftConfig(r=2, lora_dropout=0.0),
    "own router": lambda: RoutedConfig(wraps="experts", num_experts=3, r=2),
    "in turn": lambda: of_kind(experts="bottleneck", experts_args={"activations": ["silu", "relu"]}),
    "shared": lambda: of_kind(experts_args={"shared": 1}),
    "shared down": lambda: of_kind(experts="shared_down"),
}
BATCH = padded_batch([6, 4], seed=1)


@pytest.fixture
def group(tmp_path):
    with group_of_one(tmp_path):
        yield


def adapted(base, *configs):
    """A model with active adapters of values that change the output, the same whether they are split or not."""
    torch.manual_seed(0)
    model = get_peft_model(base, configs[0])
    for place, config in enumerate(configs[1:]):
        model.add_adapter(f"other{place}", config)
    model.base_model.set_adapter(list(model.peft_config))
    return filled(model)


def filled(model):
    for seed, name in enumerate(model.peft_config):
        generator = torch.Generator().manual_seed(seed)
        state = get_peft_model_state_dict(model, adapter_name=name)
        values = {key: 0.3 * torch.randn(own.shape, generator=generator) for key, own in state.items()}
        set_peft_model_state_dict(model, values, adapter_name=name)
    return model


def measured(model):
    model.zero_grad()
    logits = model(**BATCH, use_cache=False).logits
    logits.square().mean().backward()
    gradients = {name: own.grad for name, own in model.named_parameters() if own.grad is not None}
    return logits.detach(), {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def assert_equal_to(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [*CONFIGS, *WHOLE])
def test_an_adapter_computes_saves_and_loads_as_a_whole_one(case, group, tmp_path):
    config = {**CONFIGS, **WHOLE}[case]
    whole = adapted(tiny_olmoe(), config())
    whole.save_pretrained(tmp_path / "whole")
    base = shared_out(tiny_olmoe())
    model = get_peft_model(base, config())
    split = [own for own in model.parameters() if own.requires_grad and isinstance(own, DTensor)]
    assert bool(split) == (case in CONFIGS)
    assert all((case in CONFIGS) == ("default" in layer.splits) for layer in routed_layers(model) if case != "perft-r")
    model.load_adapter(tmp_path / "whole", "default", is_trainable=True)
    expected = measured(whole)
    assert_equal_to(measured(model), expected)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_to(measured(model.train()), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCH).logits, expected[0], rtol=1e-5, atol=1e-6)
        with model.disable_adapter():
            torch.testing.assert_close(model(**BATCH).logits, base(**BATCH).logits)
    model.save_pretrained(tmp_path / "split")
    again = PeftModel.from_pretrained(tiny_olmoe(), tmp_path / "split").eval()
    torch.testing.assert_close(again(**BATCH).logits, expected[0], rtol=1e-5, atol=1e-6)


def test_active_adapters_add_up(group):
    configs = [CONFIGS["perft-e"], lambda: PerftConfig(variant="E", r=3, lora_dropout=0.0)]
    expected = measured(adapted(tiny_olmoe(), *(own() for own in configs)))
    assert_equal_to(measured(adapted(shared_out(tiny_olmoe()), *(own() for own in configs))), expected)
    copies = [lambda: EsftConfig(experts={"0": [1]}), lambda: EsftConfig(experts={"0": [3], "1": [2]})]
    expected = measured(adapted(tiny_olmoe(), *(own() for own in copies)))
    assert_equal_to(measured(adapted(shared_out(tiny_olmoe()), *(own() for own in copies))), expected)


@pytest.mark.parametrize("order", [("perft-e", "expert-lora"), ("expert-lora", "perft-e")])
def test_adapters_of_two_types_act_around_each_other(order, group):
    def both(base):
        with pytest.warns(MoePeftWarning, match="has an adapter of another type"):
            return adapted_twice(base, *(CONFIGS[name]() for name in order))

    def adapted_twice(base, first, second):
        inner = filled(get_peft_model(base, first, adapter_name="inner"))
        return filled(get_peft_model(inner.base_model.model, second))

    expected = measured(both(tiny_olmoe()))
    assert_equal_to(measured(both(shared_out(tiny_olmoe()))), expected)


def test_decisions_are_recorded_as_those_of_a_whole_adapter(group):
    def load(model):
        with torch.no_grad(), telemetry.record(model) as routings:
            model(**BATCH)
        return {place: telemetry.load(routing) for place, (routing,) in routings.items()}

    expected = load(adapted(tiny_olmoe(), CONFIGS["perft-e"]()))
    found = load(adapted(shared_out(tiny_olmoe()), CONFIGS["perft-e"]()))
    assert found.keys() == expected.keys() and expected
    assert all(torch.equal(found[place], own) for place, own in expected.items())


def test_dropout_acts_in_training_alone(group):
    model = adapted(shared_out(tiny_olmoe()), PerftConfig(variant="E", r=2, lora_dropout=0.5)).train()
    first, second = model(**BATCH).logits, model(**BATCH).logits
    assert not torch.allclose(first, second)
    assert torch.equal(model.eval()(**BATCH).logits, model(**BATCH).logits)


def test_what_a_split_adapter_cannot_do_is_refused(group, tmp_path):
    model = adapted(shared_out(tiny_olmoe()), CONFIGS["esft"]()).eval()
    with pytest.raises(ValueError, match="split over processes, so nothing can be merged"):
        model.merge_adapter()
    (layer, _) = routed_layers(model)
    assert layer.delta_products("default") is None
    with pytest.raises(ValueError, match="cannot be mixed in a batch"):
        model(**BATCH, adapter_names=["default", "default"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"Use PeftModel\.from_pretrained"):
        shared_out(tiny_olmoe()).load_adapter(tmp_path)
    model.add_adapter("other", EsftConfig(experts={"0": [2]}))
    model.delete_adapter("default")
    assert [set(own.splits) for own in routed_layers(model)] == [{"other"}, set()] or len(routed_layers(model)) == 1
