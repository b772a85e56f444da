"""Fused experts computed with other tensors equal the module with those tensors inside, in every layout."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from moe_peft.backbone.expert_tensors import expert_tensors, run_experts
from moe_peft.backbone.structure import find_moe_layers
from tests.backbones.models import EXPERTS, FOLLOWED, NO_SLICES, known, tiny_model

IDS = [1, 4, 5]


def experts_of(model_type: str) -> nn.Module:
    """The fused experts of one layer of a type, with weights that no layout hides."""
    if not known(model_type):
        pytest.skip(f"the installed transformers has no {model_type}")
    if model_type == "muse_spark_text":
        from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

        experts = MuseSparkExperts(
            AutoConfig.for_model(model_type, num_local_experts=EXPERTS, moe_hidden_size=32, moe_intermediate_size=16)
        )
    else:
        model = tiny_model(model_type)
        experts = model.get_submodule(find_moe_layers(model)[0].experts)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return experts


def inputs(experts: nn.Module, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """13 tokens of the width of the experts, routed among three experts."""
    width = expert_tensors(experts, EXPERTS)["down_proj"].shape[2 if _transposed(experts) else 1]
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(13, width, generator=generator)
    index = torch.rand(13, len(IDS), generator=generator).argsort(1)[:, :top_k]
    return hidden, index, torch.rand(13, top_k, generator=generator)


def _transposed(experts: nn.Module) -> bool:
    return bool(getattr(experts, "is_transposed", False))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("model_type", [*(t for t in FOLLOWED if t not in NO_SLICES), "muse_spark_text"])
def test_slices_compute_what_the_module_computes_for_their_experts(model_type, top_k):
    experts = experts_of(model_type)
    own = expert_tensors(experts, EXPERTS)
    assert all(tensor.shape[0] == EXPERTS for tensor in own.values())
    slices = {name: tensor[IDS].detach().clone().requires_grad_() for name, tensor in own.items()}
    hidden, index, weights = inputs(experts, top_k)
    # The experts' own loop may not run with a single slot per token, as that of longcat_flash.
    two_slots = torch.cat([torch.tensor(IDS)[index]] * 2, 1), torch.cat([weights, torch.zeros_like(weights)], 1)
    expected = experts(hidden, *two_slots)
    found = run_experts(experts, slices, EXPERTS, hidden, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    wanted = torch.autograd.grad(expected.square().sum(), [experts.get_parameter(name) for name in own])
    got = torch.autograd.grad(found.square().sum(), list(slices.values()))
    for name, full, part in zip(own, wanted, got, strict=True):
        torch.testing.assert_close(part, full[IDS], rtol=1e-3, atol=1e-3, msg=lambda text, name=name: name + text)


def test_own_tensors_are_views_that_can_be_written():
    experts = experts_of("longcat_flash")
    own = expert_tensors(experts, EXPERTS)
    assert experts.gate_up_proj.shape[0] == EXPERTS + 3 and own["gate_up_proj"].shape[0] == EXPERTS
    with torch.no_grad():
        own["gate_up_proj"][2] = 7.0
    assert (experts.gate_up_proj[2] == 7.0).all() and not (experts.gate_up_proj[3] == 7.0).any()


def test_biases_belong_to_the_tensors():
    names = {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
    assert set(expert_tensors(experts_of("gpt_oss"), EXPERTS)) == names


def test_experts_in_another_form_have_no_tensors():
    model = tiny_model("dbrx")
    assert expert_tensors(model.get_submodule(find_moe_layers(model)[0].experts), EXPERTS) == {}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_implementation_is_the_modules_own_and_the_module_stays_as_it_is(implementation):
    experts = experts_of("qwen3_moe")
    experts.config._experts_implementation = implementation
    experts.register_forward_hook(lambda *args: pytest.fail("a hook of the module ran"))
    before = copy.deepcopy(experts.state_dict())
    hidden, index, weights = inputs(experts, 2)
    slices = {name: torch.zeros_like(tensor[IDS]) for name, tensor in expert_tensors(experts, EXPERTS).items()}
    assert not run_experts(experts, slices, EXPERTS, hidden, index, weights).any()
    assert experts.num_experts == EXPERTS
    assert all(torch.equal(tensor, before[name]) for name, tensor in experts.state_dict().items())


def test_packed_experts_are_unpacked():
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    experts = experts_of("qwen3_moe")
    plain = copy.deepcopy(experts)
    for name in ("gate_up_proj", "down_proj"):
        parametrize.replace_parameter_4bit(experts, name)
    own = expert_tensors(experts, EXPERTS)
    assert set(own) == {"gate_up_proj", "down_proj"}
    hidden, index, weights = inputs(plain, 2)
    slices = {name: tensor[IDS].detach() for name, tensor in own.items()}
    expected = experts(hidden, torch.tensor(IDS)[index], weights)
    found = run_experts(experts, slices, EXPERTS, hidden, index, weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
