"""An upcycled LoRA is the LoRA at the start, and its experts differ by the rows that were drawn again."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from moe_peft import RoutedConfig, routed_layers
from moe_peft.tools import upcycle
from tests.tiny import tiny_llama
from tests.tools.exported import logits, trained_lora


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return trained_lora(tmp_path_factory.mktemp("lora") / "own", r=4, rank_pattern={"up_proj": 2})


@pytest.mark.parametrize(
    ("num_experts", "fields"),
    [
        (4, {}),
        (1, {}),
        (3, {"config": RoutedConfig(router="dense", task_type="CAUSAL_LM")}),
        (3, {"config": RoutedConfig(gate="sigmoid", norm_topk_prob=True)}),
        (2, {"split": True}),
    ],
)
def test_without_new_rows_it_equals_the_lora(num_experts, fields, lora):
    model = upcycle(tiny_llama(), lora, num_experts, **fields)
    expected = logits(PeftModel.from_pretrained(tiny_llama(), lora))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    assert model.peft_config["default"].num_experts == num_experts


def test_each_expert_has_its_share_of_new_rows_which_add_nothing_at_the_start(lora):
    plain, drawn = (upcycle(tiny_llama(), lora, 3, rho=rho, seed=5) for rho in (0.0, 0.5))
    again = upcycle(tiny_llama(), lora, 3, rho=0.5, seed=5)
    for one, other, same in zip(*map(routed_layers, (plain, drawn, again)), strict=True):
        old, new = one.experts["default"], other.experts["default"]
        changed_Er = (new.A != old.A).any(-1)
        rank = int(old.B[0].any(-1).sum())
        assert changed_Er.sum(-1).tolist() == [round(0.5 * rank)] * 3
        assert not new.B[changed_Er].any() and torch.equal(new.B[~changed_Er], old.B[~changed_Er])
        assert torch.equal(same.experts["default"].A, new.A)
    whole = [layer.experts["default"].A for layer in routed_layers(upcycle(tiny_llama(), lora, 3, rho=1.0))]
    assert all(not torch.equal(A[0], A[1]) for A in whole)


@pytest.mark.parametrize(
    ("num_experts", "fields", "message"),
    [
        (0, {}, "num_experts=0"),
        (True, {}, "num_experts=True"),
        (2, {"rho": 1.5}, "rho=1.5"),
        (2, {"rho": 0.5, "split": True}, "rho=0.5"),
        (3, {"split": True}, "does not divide"),
        (3, {"config": RoutedConfig(router="top_k", top_k=1)}, "norm_topk_prob=True"),
        (2, {"split": True, "config": RoutedConfig(router="dense")}, "routed_scaling_factor=2"),
        (2, {"config": RoutedConfig(r=7)}, "follows from"),
        (2, {"config": RoutedConfig(scorer="activation_norm")}, "reads 'activations'"),
    ],
)
def test_numbers_and_routers_that_make_another_model_are_refused(num_experts, fields, message, lora):
    base = tiny_llama()
    with pytest.raises(ValueError, match=message):
        upcycle(base, lora, num_experts, **fields)
    assert not hasattr(base, "peft_config")
