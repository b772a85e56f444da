"""Tools refuse what cannot be their arguments, and adapters whose numbers say nothing, before anything changes."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import moe_peft
from moe_peft import tools
from moe_peft.tools.checks import check_whole, is_real, listed_batches
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama

BATCHES = [padded_batch([6, 4])]
NAN, INF = float("nan"), float("inf")


def adapted(value=None, part="experts", task="CAUSAL_LM", **fields):
    """A model with a trained adapter, of which one number may be broken."""
    settings = {"num_experts": 3, "r": 2, "top_k": 2, "target_modules": ["q_proj"]}
    model = get_peft_model(tiny_llama(), moe_peft.RoutedConfig(task_type=task, **{**settings, **fields}))
    randomize(model)
    if value is not None:
        bank = getattr(moe_peft.routed_layers(model)[-1], part)["default"]
        next(bank.parameters()).data.view(-1)[-1] = value
    return model.eval()


def state(model):
    return (
        [name for name, _ in model.named_modules()],
        list(model.peft_config),
        list(model.base_model.active_adapters),
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.detach().nan_to_num(7.0).clone() for parameter in model.parameters()],
    )


def same(one, other):
    return one[:4] == other[:4] and all(torch.equal(a, b) for a, b in zip(one[4], other[4], strict=True))


# What is asked of a broken adapter, by the tool's name.
USES = {
    "add_expert": lambda model, folder: tools.add_expert(model, "more", copy_of=0),
    "prune_experts": lambda model, folder: tools.prune_experts(model, "small", 2, BATCHES),
    "merging": lambda model, folder: tools.prune_experts(model, "small", 2, BATCHES, merge=True),
    "distil_to_lora": lambda model, folder: tools.distil_to_lora(model, folder, BATCHES, fresh_base=tiny_llama),
    "delta_similarity": lambda model, folder: tools.delta_similarity(model),
    "export_lora": lambda model, folder: tools.export_lora(model, folder),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(("value", "part"), [(NAN, "experts"), (-INF, "router")])
def test_an_adapter_that_is_not_finite_is_refused_with_the_names_of_its_tensors(use, value, part, tmp_path):
    fields = {"num_experts": 1, "router": "dense", "top_k": None} if use == "export_lora" else {}
    model = adapted(value, part, **fields)
    before = state(model)
    name = r"1\.self_attn\.q_proj\." + part
    with pytest.raises(ValueError, match=f"holds NaN or infinite values in 1 tensors: .*{name}"):
        USES[use](model, tmp_path / "out")
    assert same(before, state(model)) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_broken_base_weight_is_named_by_what_it_does_to_the_measurement(value, tmp_path):
    model = adapted()
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.data[0, 0] = value
    before = state(model)
    for use in ("prune_experts", "distil_to_lora"):
        with pytest.raises(ValueError, match="probabilities of the PeftModelForCausalLM are not finite"):
            USES[use](model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"weights of the experts at .*1\.self_attn\.q_proj .* are not finite"):
        tools.routing_report(model, {"all": BATCHES})
    assert same(before, state(model)) and not list(tmp_path.iterdir())


def test_measuring_leaves_the_active_adapter_and_what_trains(tmp_path):
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    before = state(model)
    with pytest.raises(ValueError, match="new_name='other' is an adapter of the model already"):
        tools.prune_experts(model, "other", 2, BATCHES)
    tools.distil_to_lora(model, tmp_path / "out", BATCHES, fresh_base=tiny_llama, rank=1)
    assert same(before, state(model))


NO_MODELS = {
    "add_expert": lambda: tools.add_expert(tiny_llama(), "new"),
    "prune_experts": lambda: tools.prune_experts(None, "new", 1, BATCHES),
    "distil_to_lora": lambda: tools.distil_to_lora(tiny_llama(), "out", BATCHES, fresh_base=tiny_llama),
    "merge_for_task": lambda: tools.merge_for_task(tiny_llama(), 0),
    "export_lora": lambda: tools.export_lora(tiny_llama(), "out"),
    "export_merged": lambda: tools.export_merged("model", "base", "out"),
    "routing_saturation": lambda: tools.routing_saturation(tiny_llama(), ["a", "b"], BATCHES),
    "fit_centroids": lambda: tools.fit_centroids(tiny_llama(), {0: BATCHES}),
    "fit_directions": lambda: tools.fit_directions(tiny_llama()),
    "compose": lambda: tools.compose("model", {"a": "folder"}),
    "upcycle": lambda: tools.upcycle(None, "folder", 2),
    "import_mixture": lambda: tools.import_mixture("model", "folder"),
    "super_experts": lambda: tools.super_experts("model", BATCHES),
    "SelfContrast": lambda: tools.SelfContrast("model"),
    "expert_mask": lambda: tools.expert_mask("model", off=[0]).__enter__(),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model_or_has_no_adapters_is_named_with_what_to_give(name):
    with pytest.raises(TypeError, match=f"{name}: (model|base)=.* is no (PeftModel|model)\\. Give "):
        NO_MODELS[name]()


WRONG = {
    "copy_of": lambda model: tools.add_expert(model, "new", copy_of=1.0),
    "new_name": lambda model: tools.add_expert(model, None),
    "batches": lambda model: tools.prune_experts(model, "new", 2, 7),
    "max_lost": lambda model: tools.distil_to_lora(model, "out", BATCHES, fresh_base=tiny_llama, max_lost=NAN),
    "learning_rate": lambda model: tools.distil_to_lora(
        model, "out", BATCHES, fresh_base=tiny_llama, learning_rate="1e-3"
    ),
    "fresh_base": lambda model: tools.distil_to_lora(model, "out", BATCHES, fresh_base=None),
    "checkpoints": lambda model: tools.routing_saturation(model, [None, None], BATCHES),
    "weak": lambda model: tools.SelfContrast(model, weak=3),
    "attention_mask": lambda model: tools.SelfContrast(model, attention_mask=[1]),
    "on": lambda model: tools.expert_mask(model, on={0: 1}).__enter__(),
    "off": lambda model: tools.expert_mask(model, off={True: [1]}).__enter__(),
    "seed": lambda model: tools.upcycle(tiny_llama(), "folder", 2, seed=-1),
    "split": lambda model: tools.upcycle(tiny_llama(), "folder", 2, split="yes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named_with_what_it_must_be_and_nothing_changes(name):
    model = adapted()
    before = state(model)
    with pytest.raises((TypeError, ValueError), match=name):
        WRONG[name](model)
    assert same(before, state(model))


def test_one_adapter_is_named_where_several_are_active():
    model = adapted(scorer="task_table", router="top_k", router_args={"num_tasks": 2})
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"'default', 'other'.* are active; one is merged. Name it"):
        tools.merge_for_task(model, 0)
    with pytest.raises(ValueError, match=r"task=.* must be a whole number"):
        tools.merge_for_task(model, 10**400, "default")


def test_numbers_in_range_are_no_truth_values_texts_or_nan():
    assert is_real(0.5, 0, 1) and is_real(1, 0, 1)
    assert not any(is_real(value, 0, 1) for value in (True, "0.5", None, NAN, INF, 2, 10**400))
    check_whole(3, "tool", "seed")
    for value in (True, 1.0, -1, "3", None, NAN, 2**63):
        with pytest.raises(ValueError, match=r"tool: seed=.* must be a whole number, 0 or more"):
            check_whole(value, "tool", "seed")


def test_batches_are_a_list_of_dicts():
    assert listed_batches(iter(BATCHES), "tool") == BATCHES
    for given, message in (
        ([], "batches is empty"),
        (BATCHES[0], "must be a list"),
        ("text", "must be a list"),
        (3, "must be a list"),
        ([{}], "must be a list"),
    ):
        with pytest.raises(ValueError, match=f"tool: .*{message}"):
            listed_batches(given, "tool")
