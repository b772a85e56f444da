"""The mean of an adapter's experts as a stock LoRA: the mixture where a matrix is shared, how far off elsewhere."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_peft import MoloraConfig, RoutedConfig, routed_layers
from moe_peft.tools import average_experts
from tests.contract.cases import randomize
from tests.tiny import tiny_gpt2, tiny_llama
from tests.tools.exported import BATCH, logits

RANDOM = {"router": "random", "num_experts": 3, "r": 2}


def adapted(build=tiny_llama, **fields):
    config = RoutedConfig(**{**RANDOM, "target_modules": ["q_proj", "up_proj"], **fields})
    model = get_peft_model(build().double(), config).double().eval()
    randomize(model)
    return model


@torch.no_grad()
def share(model, name: str):
    """Let all experts of a place have the first one's matrix."""
    for layer in routed_layers(model):
        own = layer.experts["default"].get_parameter(name)
        own.copy_(own[:1].expand_as(own))
    return model


EXACT = {
    "one A": lambda: share(adapted(), "A"),
    "one B": lambda: share(adapted(), "B"),
    "one B beside a shared expert": lambda: _routed_alike("B"),
    "one down matrix": lambda: adapted(experts="shared_down"),
    "diagonals": lambda: adapted(experts="cp_diagonal"),
    "a sum instead of a mean": lambda: share(adapted(router="constant"), "A"),
    "weights of the layer": lambda: share(adapted(router="dense", scorer="layer_logits"), "A"),
    "transposed layers": lambda: share(adapted(tiny_gpt2, target_modules=["c_attn", "c_fc"]), "B"),
}


@torch.no_grad()
def _routed_alike(name: str):
    model = adapted(experts_args={"shared": 1})
    for layer in routed_layers(model):
        own = layer.experts["default"].get_parameter(name)
        own[:3] = own[:1]
    return model


@pytest.mark.parametrize("case", EXACT)
def test_where_experts_share_a_matrix_the_lora_is_the_mixture(case, tmp_path):
    model = EXACT[case]()
    expected, found = logits(model), average_experts(model, tmp_path / "lora")
    assert found.exact and "equal to the mixture" in str(found) and found.rank == (4 if "shared expert" in case else 2)
    build = tiny_gpt2 if case == "transposed layers" else tiny_llama
    stock = PeftModel.from_pretrained(build().double(), tmp_path / "lora").double()
    torch.testing.assert_close(logits(stock), expected, rtol=0, atol=1e-5)


def test_elsewhere_it_is_the_mean_of_either_matrix_and_says_how_far_off(tmp_path):
    model = adapted()
    found = average_experts(model, tmp_path / "lora")
    assert not found.exact and "approximate, off the mixture" in str(found)
    assert str(found) in (tmp_path / "lora/README.md").read_text()
    stock = PeftModel.from_pretrained(tiny_llama().double(), tmp_path / "lora").double()
    modules = dict(stock.get_base_model().named_modules())
    for name, layer in model.get_base_model().named_modules():
        if layer in routed_layers(model):
            bank, own = layer.experts["default"], modules[name]
            mixture = bank.scaling * torch.einsum("ero,erd->od", bank.B, bank.A) / 3
            mean = bank.scaling * bank.B.mean(0).T @ bank.A.mean(0)
            torch.testing.assert_close(own.get_delta_weight("default"), mean, rtol=1e-5, atol=1e-6)
            assert found.lost[name] == pytest.approx(float((mean - mixture).norm() / mixture.norm()), rel=1e-6)


def test_an_adapter_by_task_has_a_mean_for_each(tmp_path):
    table = {"scorer": "task_table", "router": "dense", "num_experts": 3, "router_args": {"num_tasks": 2}}
    model = get_peft_model(tiny_llama().double(), RoutedConfig(**table, r=2)).double().eval()
    randomize(model)
    share(model, "A")
    with pytest.raises(ValueError, match="task=0"):
        average_experts(model, tmp_path / "none")
    for task in (0, 1):
        assert average_experts(model, tmp_path / str(task), task=task).exact
        stock = PeftModel.from_pretrained(tiny_llama().double(), tmp_path / str(task)).double()
        with torch.no_grad():
            expected = model(**BATCH, task_type=torch.tensor([task, task])).logits
        torch.testing.assert_close(logits(stock), expected, rtol=0, atol=1e-5)


def test_an_adapter_that_has_learned_nothing_yet_has_an_exact_mean(tmp_path):
    model = get_peft_model(tiny_llama(), RoutedConfig(**RANDOM))
    assert average_experts(model, tmp_path / "lora").exact


def test_weights_that_depend_on_the_token_are_refused_and_nothing_is_written(tmp_path):
    model = get_peft_model(tiny_llama(), MoloraConfig(num_experts=2))
    with pytest.raises(ValueError, match=r"depend on the token.*distil_to_lora"):
        average_experts(model, tmp_path / "lora")
    with pytest.raises(TypeError, match="no PeftModel"):
        average_experts(tiny_llama(), tmp_path / "lora")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="holds files"):
        average_experts(adapted(), tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
