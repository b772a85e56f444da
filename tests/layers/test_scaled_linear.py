"""A linear layer scaled at its output or input: several adapters, mixed rows, merging, dtypes, what routers see."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from moe_peft import MoePeftWarning, MovConfig, router_loss, telemetry
from moe_peft.layers import ScaledLinear
from tests.contract.cases import randomize
from tests.tiny import padded_batch, tiny_t5


class Attention(nn.Module):
    """A key projection with heads of 4, called as attention modules are."""

    head_dim = 4

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.k_proj = base

    def forward(self, x):
        return self.k_proj(x)


class Model(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.self_attn = Attention(base)

    def forward(self, x, attention_mask=None):
        return self.self_attn(x)


def model_of(base: nn.Module | None = None, **fields):
    """A model around one scaled layer with random adapter weights, in eval mode."""
    config = MovConfig(**{"target_modules": ["k_proj"], "num_experts": 3, **fields})
    model = get_peft_model(Model(base or nn.Linear(12, 8)), config).eval()
    randomize(model)
    return model


def layer_of(model) -> ScaledLinear:
    return model.base_model.model.self_attn.k_proj


def with_second(model, **fields):
    """The model with a second adapter beside "default"."""
    config = MovConfig(**{"target_modules": ["k_proj"], "num_experts": 3, "init_weights": False, **fields})
    model.add_adapter("second", config)
    return model.eval()


def scales(model, name: str, u: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """1 + sum_e p_e (l_e - 1), head by head, by the formula."""
    layer = layer_of(model)
    bank, router = layer.experts[name], layer.router[name].weight
    heads = bank.num_heads
    probs = (read.reshape(-1, heads, router.shape[1]) @ router.T).softmax(-1)
    offsets = bank.vectors.view(bank.vectors.shape[0], heads, -1) - 1
    return (1 + torch.einsum("the,ehd->thd", probs, offsets)).reshape(u.shape)


SIDES = [{}, {"router_granularity": "token"}, {"router_input": "hidden"}, {"feedforward_modules": ["k_proj"]}]


@pytest.mark.parametrize("fields", SIDES)
@pytest.mark.parametrize("base", [lambda: nn.Linear(12, 8), lambda: Conv1D(8, 12)])
def test_layer_equals_the_formula(base, fields):
    model = model_of(base(), **fields).double()
    layer, x = layer_of(model), torch.randn(2, 5, 12, dtype=torch.float64)
    assert layer.experts["default"].num_heads == (2 if not fields else 1)
    if "feedforward_modules" in fields:
        expected = layer.base_layer(x * scales(model, "default", x, x))
    else:
        u = layer.base_layer(x)
        expected = u * scales(model, "default", u, x if "router_input" in fields else u)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0])
    assert layer(x[:0]).shape == (0, 5, 8) and layer(x[:, :0]).shape == (2, 0, 8)


@pytest.mark.parametrize("fields", SIDES)
def test_scales_of_active_adapters_multiply_in_any_order(fields):
    model = with_second(model_of(**fields), **fields).double()
    layer, x = layer_of(model), torch.randn(5, 12, dtype=torch.float64)
    u = x if "feedforward_modules" in fields else layer.base_layer(x)
    read = x if "router_input" in fields else u
    expected = u * scales(model, "default", u, read) * scales(model, "second", u, read)
    expected = layer.base_layer(expected) if "feedforward_modules" in fields else expected
    for names in (["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(names)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("second", [{}, {"feedforward_modules": ["k_proj"]}])
def test_rows_with_adapters_of_their_own_equal_single_runs(second):
    model = with_second(model_of(), **second).double()
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    expected = {"__base__": layer_of(model).base_layer(x)}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = model(x)
    names = ["second", "__base__", "default", "second"]
    calls = []
    layer_of(model).base_layer.register_forward_hook(lambda *args: calls.append(1))
    found = model(x, adapter_names=names)
    assert len(calls) == 1
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], expected[name][row])
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        layer_of(model)(x, adapter_names=names[:2])


MERGES = [
    (base, fields)
    for base in (lambda: nn.Linear(12, 8), lambda: nn.Linear(12, 8, bias=False), lambda: Conv1D(8, 12))
    for fields in ({}, {"feedforward_modules": ["k_proj"]})
]


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize(("base", "fields"), MERGES)
def test_one_vector_merges_exactly_and_unmerges_bit_for_bit(base, fields, safe_merge):
    model = model_of(base(), num_experts=1, **fields)
    layer, x = layer_of(model), torch.randn(5, 12)
    if getattr(layer.base_layer, "bias", None) is not None:
        nn.init.normal_(layer.base_layer.bias)
    before, expected = copy.deepcopy(layer.base_layer.state_dict()), model(x)
    plain = layer.base_layer(x)
    assert not torch.allclose(expected, plain)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(layer.base_layer(x), expected)
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.base_layer.state_dict().items())
    assert torch.equal(model(x), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_two_adapters_merge_one_after_the_other_and_come_apart_together():
    model = with_second(model_of(num_experts=1), num_experts=1, feedforward_modules=["k_proj"])
    layer, x = layer_of(model), torch.randn(5, 12)
    before = layer.base_layer.weight.clone()
    model.base_model.set_adapter(["default", "second"])
    expected = model(x)
    model.merge_adapter(["default"])
    torch.testing.assert_close(model(x), expected)  # the other one still acts
    model.merge_adapter(["second"])
    assert layer.merged_adapters == ["default", "second"]
    torch.testing.assert_close(layer.base_layer(x), expected)
    with pytest.raises(ValueError, match="call `unmerge_adapter` first"):
        layer(x, adapter_names=["default"] * 5)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged and layer.originals == ()


def test_unmerging_follows_a_model_that_was_cast_in_between():
    model = model_of(num_experts=1)
    before = layer_of(model).base_layer.weight.clone()
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert torch.equal(layer_of(model).base_layer.weight, before.double())
    with pytest.warns(MoePeftWarning, match="Already unmerged"):
        layer_of(model).unmerge()


def test_several_vectors_are_not_merged():
    model = model_of()
    with pytest.raises(ValueError, match=r"depends on the input of self_attn\.k_proj"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="weighs its experts by the input"):
        layer_of(model).merge()


@pytest.mark.parametrize("broken", ["weight", "bias"])
def test_values_that_are_not_finite_are_not_merged_safely(broken):
    model = model_of(num_experts=1)
    layer = layer_of(model)
    getattr(layer.base_layer, broken).data.view(-1)[0] = float("inf")
    before = copy.deepcopy(layer.base_layer.state_dict())
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.base_layer.state_dict().items())


def test_sixteen_bit_input_gives_sixteen_bit_output_and_float32_logits():
    model = model_of(nn.Linear(12, 8).to(torch.bfloat16))
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    with telemetry.record(model) as routings:
        assert model(x).dtype == torch.bfloat16
    (routing,) = routings["self_attn.k_proj"]
    assert routing.logits.dtype == torch.float32
    u = layer_of(model).base_layer(x).float().view(-1, 4)
    torch.testing.assert_close(routing.logits, u @ layer_of(model).router["default"].weight.T)


def test_heads_of_padding_do_not_count():
    model = model_of(router_aux_loss_coef=0.5).train()
    x = torch.randn(2, 3, 12)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    with telemetry.record(model) as routings:
        model(x, attention_mask=mask)
    (routing,) = routings["self_attn.k_proj"]
    assert routing.valid.tolist() == [True] * 8 + [False] * 4  # two heads per token
    loss = router_loss(model)
    noisy = x.clone()
    noisy[1, 1:] += 5
    model(noisy, attention_mask=mask)
    torch.testing.assert_close(router_loss(model), loss)


def test_keys_of_cross_attention_have_the_encoders_mask():
    model = get_peft_model(tiny_t5(), MovConfig(num_experts=3, router_granularity="token")).train()
    batch = padded_batch([9, 4])
    labels = torch.randint(3, 64, (2, 5))
    with telemetry.record(model) as routings:
        model(**batch, labels=labels)
    (keys,) = routings["decoder.block.0.layer.1.EncDecAttention.k"]
    assert torch.equal(keys.valid, batch["attention_mask"].bool().flatten())
    (own,) = routings["decoder.block.0.layer.0.SelfAttention.k"]
    assert own.probs.shape[0] == labels.numel()


def test_saved_for_the_backward_pass():
    """Beside x and the float32 logits, one tensor as wide as what is scaled; the router reads the same one."""
    num_tokens, base = 64, nn.Linear(12, 8)
    model = model_of(base).train()
    saved: dict[int, torch.Tensor] = {}
    x = torch.randn(1, num_tokens, 12)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.setdefault(tensor.data_ptr(), tensor), lambda tensor: tensor
    ):
        model(x)
    wide = [tensor for tensor in saved.values() if tensor.numel() == num_tokens * 8]
    assert len(wide) == 1
