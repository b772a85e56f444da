"""A wrapped block: any input shape, jitter, tuples, mixed rows, several adapters, precision, one compiled graph."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from moe_peft import PerftConfig
from moe_peft.layers import RoutedBlock
from tests.contract.cases import randomize
from tests.perft_models import BUILDERS, block_of, perft_config, perft_model, router_weight, sparse_model
from tests.tiny import padded_batch


class Block(nn.Module):
    """An MLP whose output may come in a tuple, transposed in memory, or after noise on the input."""

    def __init__(self, form: str = "plain", jitter: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.form, self.input_jitter_noise = form, jitter

    def forward(self, hidden_states, scale: float = 1.0):
        if self.training and self.input_jitter_noise > 0:
            hidden_states *= torch.empty_like(hidden_states).uniform_(0.5, 1.5)
        out = scale * self.down(self.up(hidden_states).relu())
        if self.form == "transposed":
            return out.mT.contiguous().mT
        return (out, "logits", None) if self.form == "tuple" else out


def wrapped(variant: str = "R", **block) -> RoutedBlock:
    torch.manual_seed(0)
    config = PerftConfig(variant=variant, r=2, lora_dropout=0.0, target_modules=["0"])
    model = get_peft_model(nn.Sequential(Block(**block)), config).eval()
    randomize(model)
    return model.base_model.model[0]


@pytest.mark.parametrize("variant", ["R", "D", "S"])
def test_any_leading_shape_gives_the_same_tokens(variant):
    layer, x = wrapped(variant), torch.randn(3, 5, 8)
    expected = layer(x)
    torch.testing.assert_close(layer(x.reshape(-1, 8)), expected.reshape(-1, 8))
    torch.testing.assert_close(layer(x[:1, :1]), expected[:1, :1])
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0])
    torch.testing.assert_close(layer(x.unsqueeze(0)), expected.unsqueeze(0))
    assert layer(x[:0]).shape == (0, 5, 8) and layer(x[:, :0]).shape == (3, 0, 8)


def test_arguments_and_further_outputs_pass_through():
    layer, plain, x = wrapped(form="tuple"), wrapped(), torch.randn(3, 5, 8)
    out, *rest = layer(hidden_states=x, scale=2.0)
    assert rest == ["logits", None]
    torch.testing.assert_close(out, plain(x, 2.0))
    assert not torch.equal(plain(x, 2.0), plain(x))


def test_a_block_without_a_floating_input_is_refused():
    with pytest.raises(TypeError, match="called without a floating tensor"):
        wrapped()(torch.ones(2, 3, dtype=torch.long))


def test_an_output_of_other_strides_is_added_to():
    layer, plain, x = wrapped(form="transposed"), wrapped(), torch.randn(3, 5, 8)
    torch.testing.assert_close(layer(x), plain(x))


def test_the_block_s_own_output_stays_as_its_hooks_saw_it():
    layer, seen, x = wrapped(), [], torch.randn(3, 5, 8)
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    layer(x)
    assert torch.equal(seen[0], layer.get_base_layer()(x))


@pytest.mark.filterwarnings("ignore:A routed layer in train mode ran outside")
def test_adapters_read_the_input_before_a_block_puts_noise_on_it_in_place():
    layer, x = wrapped(jitter=0.5).train(), torch.randn(3, 5, 8)
    torch.manual_seed(1)
    given = x.clone()
    base_out = layer.get_base_layer()(given)
    assert not torch.equal(given, x)
    torch.manual_seed(1)
    out = layer(x.clone().requires_grad_() * 1.0)
    clean = wrapped().eval()
    torch.testing.assert_close(out - base_out, clean(x) - clean.get_base_layer()(x), rtol=1e-4, atol=1e-5)
    out.sum().backward()


def test_a_real_block_with_noise_on_its_input_trains():
    model = BUILDERS["mixtral"]()
    for layer in model.model.layers:
        layer.mlp.jitter_noise = 0.3
    model = get_peft_model(model, perft_config("R", router_jitter_noise=0.1)).train()
    randomize(model)
    batch = padded_batch([9, 6])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(block.jitters for block in model.modules() if isinstance(block, RoutedBlock))
    assert router_weight(model).grad.isfinite().all() and router_weight(model).grad.abs().max() > 0


def test_noise_that_a_part_of_the_block_puts_on_its_input_is_found():
    block = Block()
    block.up.moe_jitter_eps = 0.1  # as dbrx has it in its router
    config = PerftConfig(target_modules=["0"])
    assert get_peft_model(nn.Sequential(block), config).base_model.model[0].jitters
    assert not wrapped().jitters


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v2"])
def test_rows_of_a_batch_take_their_own_adapters(name):
    model = perft_model(name, "R")
    model.add_adapter("other", perft_config("S"))
    randomize(model, seed=2)
    model.double()
    batch = padded_batch([9, 9, 9])
    expected = []
    for row, adapter in enumerate(("default", "other")):
        model.set_adapter(adapter)
        expected.append(model(input_ids=batch["input_ids"][row : row + 1]).logits)
    with model.disable_adapter():
        expected.append(model(input_ids=batch["input_ids"][2:]).logits)
    found = model(input_ids=batch["input_ids"], adapter_names=["default", "other", "__base__"]).logits
    torch.testing.assert_close(found, torch.cat(expected))


def test_flattened_tokens_cannot_mix_adapters():
    with pytest.raises(ValueError, match="cannot mix adapters in a batch"):
        wrapped()(torch.randn(6, 8), adapter_names=["default", "__base__"])


def test_active_adapters_add_up():
    model = perft_model("olmoe", "R")
    model.add_adapter("other", perft_config("D", num_experts=2))
    randomize(model, seed=2)
    model.double()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    outputs = []
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        outputs.append(block_of(model)(x))
    with model.disable_adapter():
        base = block_of(model)(x)
    torch.testing.assert_close(outputs[2] - base, outputs[0] + outputs[1] - 2 * base)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("variant", ["R", "E", "D", "S"])
def test_sixteen_bit_blocks_are_close_to_float32_ones(variant, autocast):
    exact = get_peft_model(sparse_model("olmoe"), perft_config(variant)).eval()
    randomize(exact)
    rounded = copy.deepcopy(exact)
    if not autocast:
        rounded.to(torch.bfloat16)
    x = torch.randn(2, 13, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = block_of(rounded)(x if autocast else x.bfloat16())
    expected = block_of(exact)(x)
    differences = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert differences.median() < 0.02  # a few tokens' top-k flips
    assert autocast or found.dtype == torch.bfloat16


@pytest.mark.parametrize("variant", ["R", "E"])
def test_training_without_router_losses_compiles_to_one_graph(variant):
    torch._dynamo.reset()
    coef = {"router_aux_loss_coef": 0.0} if variant == "R" else {}
    model = get_peft_model(sparse_model("olmoe"), perft_config(variant, **coef)).train()
    model.base_model.model.set_experts_implementation("batched_mm")
    randomize(model)
    ids = torch.randint(3, 60, (2, 7))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for call in (model, compiled):
        model.zero_grad()
        call(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, name=name: name + m)


def test_routers_that_are_looked_up_by_path_are_still_recorded():
    base = BUILDERS["minimax"]()
    batch = padded_batch([9, 6])
    expected = copy.deepcopy(base)(**batch, output_router_logits=True).router_logits
    model = get_peft_model(base, perft_config("R"))
    found = model(**batch, output_router_logits=True).router_logits
    assert len(expected) == 2
    torch.testing.assert_close(found, expected)
