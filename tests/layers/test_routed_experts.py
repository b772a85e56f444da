"""Adapters beside a backbone's experts follow its routing, for every implementation and every selection."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from moe_peft import EsftConfig, PerftConfig, RoutedConfig
from moe_peft.layers import RoutedExperts
from tests import perft_reference
from tests.compare import assert_same
from tests.contract.cases import randomize
from tests.perft_models import experts_of, layer_of, perft_config, perft_model, sparse_model
from tests.tiny import padded_batch


def inputs(num_tokens: int, num_experts: int = 4, top_k: int = 2):
    """Hidden states and a backbone's decision in which the last expert has no token."""
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 32, generator=generator, dtype=torch.float64).requires_grad_()
    order = torch.rand(num_tokens, num_experts - 1, generator=generator, dtype=torch.float64)
    weights = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64).requires_grad_()
    return x, order.argsort(-1)[:, :top_k], weights


def gates(index, weights, kept=None):
    """One {expert: weight} per token, of the kept experts numbered in order; a sentinel is left out."""
    kept = kept or [0, 1, 2, 3]
    return [
        {kept.index(int(e)): w for e, w in zip(*pair, strict=True) if int(e) in kept}
        for pair in zip(index, weights, strict=True)
    ]


@pytest.mark.parametrize("num_tokens", [1, 13, 63])
@pytest.mark.parametrize("by_name", [False, True])
def test_equals_the_loop_over_slots(num_tokens, by_name):
    layer = layer_of(perft_model("olmoe", "E"))
    assert isinstance(layer, RoutedExperts)
    x, index, weights = inputs(num_tokens)
    bank = layer.experts["default"]
    arguments = {"hidden_states": x, "top_k_index": index, "top_k_weights": weights}
    found = layer(**arguments) if by_name else layer(x, index, weights)
    base = layer.get_base_layer()(x, index, weights)
    expected = perft_reference.beside(base, x, bank.A, bank.B.mT, gates(index, weights), scaling=bank.scaling)
    leaves = [x, weights, bank.A, bank.B]
    assert_same(found, expected, leaves, leaves, tolerance=1e-10)


def test_slots_that_the_backbone_skips_add_nothing():
    layer = layer_of(perft_model("olmoe", "E"))
    x, index, weights = inputs(13)
    index[::2, 1] = 4
    index[3] = 4
    bank = layer.experts["default"]
    base = layer.get_base_layer()(x, index, weights)
    expected = perft_reference.beside(base, x, bank.A, bank.B.mT, gates(index, weights), scaling=bank.scaling)
    torch.testing.assert_close(layer(x, index, weights), expected)


def test_experts_that_an_adapter_does_not_select_have_none():
    config = EsftConfig(experts={"1": [0, 2]}, expert_adapter="lora", r=3)
    model = get_peft_model(sparse_model("olmoe", torch.float64), config).eval()
    randomize(model)
    layer = layer_of(model.double())
    x, index, weights = inputs(13)
    bank = layer.experts["default"]
    base = layer.get_base_layer()(x, index, weights)
    kept = gates(index, weights, [0, 2])
    expected = perft_reference.beside(base, x, bank.A, bank.B.mT, kept, scaling=bank.scaling)
    leaves = [x, weights, bank.A, bank.B]
    assert_same(layer(x, index, weights), expected, leaves, leaves, tolerance=1e-10)


def test_no_tokens_give_no_output():
    layer = layer_of(perft_model("olmoe", "E"))
    x, index, weights = inputs(13)
    assert layer(x[:0], index[:0], weights[:0]).shape == (0, 32)


@pytest.mark.parametrize("variant", ["R", "E"])
def test_every_implementation_of_the_experts_gives_the_same(variant):
    model = get_peft_model(sparse_model("olmoe"), perft_config(variant)).eval()
    randomize(model)
    batch = padded_batch([9, 6])
    outputs = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.base_model.model.set_experts_implementation(implementation)
        outputs.append(model(**batch).logits)
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0])


def test_a_router_of_its_own_may_stand_at_the_experts():
    config = RoutedConfig(wraps="experts", r=3, lora_alpha=6, num_experts=5)
    model = get_peft_model(sparse_model("olmoe", torch.float64), config)
    randomize(model)
    beside = perft_model("olmoe", "R", num_experts=5)
    batch = padded_batch([9, 6])
    found, expected = model.double().eval()(**batch).logits, beside(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_general_type_follows_the_backbone_too():
    config = RoutedConfig(wraps="experts", router="backbone", r=3, experts="bottleneck")
    model = get_peft_model(sparse_model("olmoe", torch.float64), config)
    randomize(model)
    batch = padded_batch([9, 6])
    expected = perft_model("olmoe", "E", experts="bottleneck")(**batch).logits
    torch.testing.assert_close(model.double().eval()(**batch).logits, expected, rtol=1e-12, atol=1e-12)


def test_adapters_cannot_be_mixed_where_tokens_are_flattened():
    model = perft_model("olmoe", "E")
    with pytest.raises(ValueError, match="layers that receive flattened tokens cannot mix adapters in a batch"):
        model(**padded_batch([9, 6]), adapter_names=["default", "__base__"])


def test_a_module_that_is_called_otherwise_is_told():
    layer = layer_of(perft_model("olmoe", "E"))
    layer.base_layer = nn.Identity()
    with pytest.raises(ValueError, match=r"An experts module was called with .* not with \(T, D\) hidden states"):
        layer(torch.randn(3, 32, dtype=torch.float64))


def test_following_the_backbone_needs_its_experts():
    with pytest.raises(ValueError, match="only adapters around the backbone's experts follow its routing"):
        RoutedConfig(router="backbone", wraps="block")
    with pytest.raises(TypeError, match="is no experts module of the backbone; those are"):
        get_peft_model(sparse_model("olmoe"), PerftConfig(variant="E", target_modules=["mlp"]))


@pytest.mark.parametrize("through", ["peft", "peft without autocast", "transformers"])
def test_adapters_of_eight_bit_experts_are_not_rounded_to_theirs(through, tmp_path):
    def base():
        model = sparse_model("mixtral")
        for layer in model.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(layer.mlp.experts, name).data.to(torch.float8_e4m3fn)
                setattr(layer.mlp.experts, name, nn.Parameter(weight, requires_grad=False))
        return model

    model = get_peft_model(base(), perft_config("E"))
    A = experts_of(model).A
    assert A.dtype == torch.float32 and A.unique().numel() > 0.99 * A.numel()
    model.save_pretrained(tmp_path)
    if through == "transformers":
        loaded = base()
        loaded.load_adapter(str(tmp_path))
    else:
        loaded = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=through == "peft")
    (found,) = [
        p for name, p in loaded.named_parameters() if name.endswith("layers.1.mlp.experts.perft_experts.default.A")
    ]
    assert torch.equal(found, A)
