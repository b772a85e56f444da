"""One decision per block: followers have no router of their own, use the leader's weights, and cost no loss."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from moe_peft import RoutedConfig, describe, routed_layers, router_loss
from moe_peft.routers import FollowingRouter
from moe_peft.telemetry import record
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_llama

FFN = ["gate_proj", "up_proj", "down_proj"]


def config(**fields):
    base = {"num_experts": 3, "r": 2, "router_scope": "block", "target_modules": FFN, "task_type": "CAUSAL_LM"}
    return RoutedConfig(**{**base, **fields})


def adapted(**fields):
    model = get_peft_model(tiny_llama(), config(**fields)).double()
    randomize(model)
    return model


def test_followers_hold_no_router_and_losses_count_once_for_a_block():
    model = adapted(router_aux_loss_coef=0.1).train()
    layers = routed_layers(model)
    leaders = [layer for layer in layers if not isinstance(layer.router["default"], FollowingRouter)]
    assert [layer.place.rpartition(".")[2] for layer in leaders] == ["gate_proj"] * 2
    assert sum("router" in name for name, _ in model.named_parameters()) == len(leaders)
    batch = padded_batch([5, 3])
    with record(model) as routings:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    assert set(routings) == {layer.place for layer in leaders}
    assert float(router_loss(model)) > 0
    assert all(p.grad is not None for name, p in model.named_parameters() if "_router." in name)


def test_a_block_equals_places_with_equal_decisions():
    model = adapted(router="dense").eval()
    x = torch.randn(2, 5, 32).double()
    mlp = model.base_model.model.model.layers[0].mlp
    weights = mlp.gate_proj.router["default"].weight
    gates = (x @ weights.T).softmax(-1)

    def routed(layer, x):
        bank = layer.experts["default"]
        added = torch.einsum("ble,bld,erd,ero->blo", gates, x, bank.A, bank.B)
        return layer.base_layer(x) + bank.scaling * added

    with torch.no_grad():
        h = mlp.act_fn(routed(mlp.gate_proj, x)) * routed(mlp.up_proj, x)
        torch.testing.assert_close(mlp(x), routed(mlp.down_proj, h))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    results, batch = [], padded_batch([5, 3])
    for checkpointing in (False, True):
        model = adapted(router_aux_loss_coef=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


def test_saving_loading_adapter_names_and_the_dry_run_know_of_blocks(tmp_path):
    model, batch = adapted().eval().float(), padded_batch([5, 3])
    with torch.no_grad():
        expected = model(**batch).logits
        mixed = model(**batch, adapter_names=["default", "__base__"]).logits
        torch.testing.assert_close(mixed[0], expected[0])
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
        torch.testing.assert_close(again(**batch).logits, expected)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert describe(tiny_llama(), config()).num_parameters == trained


class Backwards(nn.Module):
    """Runs its second layer before its first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.first(self.second(x))


def test_a_follower_that_runs_before_its_leader_is_refused():
    model = get_peft_model(nn.Sequential(Backwards()), config(target_modules=["first", "second"], task_type=None))
    with pytest.raises(ValueError, match=r"0\.second follows the decision of its block's first place"):
        model(torch.randn(2, 4))


def test_blocks_of_one_place_have_nothing_to_share():
    with pytest.raises(ValueError, match="router_scope='block' must be 'place': wraps='block' has one place"):
        RoutedConfig(wraps="block", router_scope="block")
