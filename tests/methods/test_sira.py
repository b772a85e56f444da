"""SiRA as a layer of a model: its formula with dropout and capacity, and its limits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from moe_peft import LoraMoeConfig, SiraConfig, describe, router_loss
from moe_peft.telemetry.functions import record
from tests import reference
from tests.compare import assert_same
from tests.tiny import OneLinear, adapted_linear, padded_batch, routed_layer_of, tiny_llama


def config(**fields):
    plain = {"num_experts": 4, "r": 3, "lora_alpha": 6, "top_k": 2, "expert_dropout": 0.0, "capacity_factor": None}
    return SiraConfig(**{**plain, "router_aux_loss_coef": 0.0, **fields})


def parts_of(model):
    layer = routed_layer_of(model)
    experts = layer.experts["default"]
    return layer.router["default"].weight, experts.A, experts.B, layer.get_base_layer().weight


def routing_of(model, x, **batch):
    with record(model) as routings:
        out = model(x, **batch)
    ((routing,),) = routings.values()
    return out, routing


@pytest.mark.parametrize("implementation", ["eager", "dense"])
@pytest.mark.parametrize("num_tokens", [0, 1, 13, 63])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_layer_equals_the_formula(implementation, num_tokens, num_experts, top_k, capacity_factor):
    model = adapted_linear(
        config(
            num_experts=num_experts,
            top_k=top_k,
            capacity_factor=capacity_factor,
            experts_implementation=implementation,
        )
    )
    x = torch.randn(num_tokens, 7, dtype=torch.float64, requires_grad=True)
    Wg, A, B, W0 = parts_of(model)
    expected = reference.sira_layer(x, W0, Wg, A, B.mT, lora_alpha=6, top_k=top_k, capacity_factor=capacity_factor)
    assert_same(model(x), expected, [x, Wg, A, B], [x, Wg, A, B])


@pytest.mark.parametrize("order", ["position", "choice"])
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_layer_with_dropout_and_capacity_equals_the_formula_on_padded_and_packed_rows(order, layout):
    model = adapted_linear(config(capacity_factor=0.6, expert_dropout=0.3, capacity_order=order, top_k=3))
    x = torch.randn(3, 9, 7, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([9, 2, 6])
    position = torch.arange(9)
    right = position < lengths[:, None]
    batch = {
        "right": {"attention_mask": right},
        "left": {"attention_mask": right.flip(1)},
        "packed": {"seq_idx": (position // torch.tensor([[3], [4], [20]])).int()},
    }[layout]
    actual, routing = routing_of(model, x, **batch)
    rows = torch.arange(3).repeat_interleave(9)
    owner = rows * 100 + batch["seq_idx"].reshape(-1) if layout == "packed" else rows
    Wg, A, B, W0 = parts_of(model)
    expected = reference.sira_layer(
        x.reshape(27, 7),
        W0,
        Wg,
        A,
        B.mT,
        lora_alpha=6,
        top_k=3,
        kept=(routing.probs != 0).tolist(),
        p=0.3,
        capacity_factor=0.6,
        sequences=owner.tolist(),
        valid=batch["attention_mask"].reshape(-1).tolist() if "attention_mask" in batch else None,
        by_choice=order == "choice",
    )
    assert routing.dropped.any() and (routing.probs == 0).any()
    assert_same(actual.reshape(27, 5), expected, [x, Wg, A, B], [x, Wg, A, B])


def test_full_k_without_dropout_or_capacity_equals_dense_mixture():
    sira = adapted_linear(config(top_k=4))
    dense = adapted_linear(LoraMoeConfig(num_experts=4, r=3, lora_alpha=6, lora_dropout=0.0, router_aux_loss_coef=0.0))
    with torch.no_grad():
        for own, other in zip(parts_of(dense), parts_of(sira), strict=True):
            own.copy_(other)
    x = torch.randn(13, 7, dtype=torch.float64)
    torch.testing.assert_close(sira(x), dense(x))


def test_one_expert_equals_plain_lora_in_evaluation():
    ours = adapted_linear(config(num_experts=1, top_k=1, expert_dropout=0.5, capacity_factor=0.1)).eval()
    stock = get_peft_model(OneLinear(7, 5), LoraConfig(r=3, lora_alpha=6, target_modules=["linear"])).double()
    _, A, B, _ = parts_of(ours)
    layer = stock.base_model.model.linear
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(A[0])
        layer.lora_B["default"].weight.copy_(B[0].T)
    x = torch.randn(13, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), stock.eval()(x))


def all_prefer(model, expert):
    """Make every token with a positive first feature ask for one expert."""
    Wg = parts_of(model)[0]
    with torch.no_grad():
        Wg.zero_()
        Wg[expert, 0] = 5.0


def tokens(*shape):
    x = torch.randn(*shape, 7, dtype=torch.float64)
    x[..., 0] = 1.0
    return x


def test_first_c_tokens_are_served():
    model = adapted_linear(config(top_k=1, capacity_factor=1.25))
    all_prefer(model, 2)
    x = tokens(2, 10)
    served = (model(x) != x @ parts_of(model)[3].T).any(-1)
    # C = ceil(1.25 * 1 * 10 / 4) = 4 in each sequence
    assert served.tolist() == [[True] * 4 + [False] * 6] * 2


def test_token_without_expert_is_encoded_by_the_base_alone():
    model = adapted_linear(config(top_k=1, capacity_factor=1.25))
    all_prefer(model, 2)
    x = tokens(10)
    out, routing = routing_of(model, x)
    base = routed_layer_of(model).get_base_layer()(x)
    lost = routing.dropped.all(-1)
    assert lost.sum() == 6
    assert torch.equal(out[lost], base[lost])
    assert not torch.isclose(out[~lost], base[~lost]).all(-1).any()


def test_capacity_and_dropout_are_off_in_evaluation():
    limited = adapted_linear(config(capacity_factor=0.1, expert_dropout=0.5)).eval()
    free = adapted_linear(config()).eval()
    x = torch.randn(13, 7, dtype=torch.float64)
    assert torch.equal(limited(x), free(x))
    assert not torch.equal(limited.train()(x), free.train()(x))


def earlier_output_changes(order, trials=60):
    changes = 0
    for seed in range(trials):
        model = adapted_linear(config(capacity_factor=0.75, capacity_order=order), seed=seed)
        x = torch.randn(1, 16, 7, dtype=torch.float64)
        other = torch.cat([x[:, :8], torch.randn(1, 8, 7, dtype=torch.float64)], dim=1)
        changes += not torch.allclose(model(x)[:, :8], model(other)[:, :8])
    return changes


def test_future_tokens_never_change_earlier_outputs():
    assert earlier_output_changes("position") == 0


def test_choice_order_lets_future_tokens_change_earlier_outputs():
    assert earlier_output_changes("choice") > 5


@pytest.mark.parametrize("order", ["position", "choice"])
def test_output_is_independent_of_batch_neighbours(order):
    model = adapted_linear(config(capacity_factor=0.5, capacity_order=order))
    x = torch.randn(3, 16, 7, dtype=torch.float64)
    together = model(x)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], model(x[row : row + 1]))


def test_kept_gates_are_divided_by_one_minus_p():
    model = adapted_linear(config(expert_dropout=0.4, top_k=4))
    x = torch.randn(200, 7, dtype=torch.float64)
    _, routing = routing_of(model, x)
    plain = (x @ parts_of(model)[0].T).softmax(-1)
    gates = routing.gate_matrix()
    kept = gates != 0
    torch.testing.assert_close(gates, torch.where(kept, plain / 0.6, 0.0))
    assert 0.5 < kept.double().mean() < 0.7


def test_dropout_before_top_k_leaves_fewer_than_k_experts_active():
    # E (1 - p) = 3 gates survive on average; with K = 4 of E = 6 about 2.9 experts are active.
    model = adapted_linear(config(num_experts=6, top_k=4, expert_dropout=0.5))
    _, routing = routing_of(model, torch.randn(4000, 7, dtype=torch.float64))
    assert routing.request_matrix().sum(-1).mean().item() == pytest.approx(2.89, abs=0.06)


def test_loss_is_counted_before_the_capacity():
    x = torch.randn(1, 16, 7, dtype=torch.float64)
    values = []
    for factor in (None, 0.25):
        model = adapted_linear(config(capacity_factor=factor, router_aux_loss_coef=1.0))
        model(x)
        values.append(router_loss(model).detach())
    assert torch.equal(*values) and values[0] > 0


def test_collapsed_router_has_a_loss_of_one_over_e():
    model = adapted_linear(config(top_k=1, router_aux_loss_coef=1.0))
    with torch.no_grad():
        parts_of(model)[0].zero_()[2, 0] = 100.0
    model(tokens(13))
    assert float(router_loss(model).detach()) == pytest.approx(1 / 4, rel=1e-9)


def test_fresh_adapter_is_the_base_bit_for_bit_in_training():
    batch = padded_batch([5, 9])
    expected = tiny_llama().eval()(**batch).logits
    model = get_peft_model(tiny_llama(), SiraConfig(expert_dropout=0.5, capacity_factor=0.5)).train()
    assert torch.equal(model(**batch).logits, expected)


def test_decoding_with_a_cache_equals_the_full_forward():
    fields = {"num_experts": 4, "top_k": 2, "capacity_factor": 0.1, "init_weights": False}
    model = get_peft_model(tiny_llama(), SiraConfig(**fields)).double().eval()
    batch = padded_batch([9])
    with torch.no_grad():
        full = model(**batch).logits
        cache, steps = None, []
        for t in range(9):
            out = model(input_ids=batch["input_ids"][:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-5, atol=1e-6)


def test_defaults_adapt_attention_with_sixteen_experts_of_rank_four():
    own = SiraConfig()
    assert (own.num_experts, own.r, own.top_k, own.router, own.capacity_order) == (16, 4, 4, "capacity", "position")
    assert (own.capacity_factor, own.expert_dropout, own.norm_topk_prob) == (1.25, 0.1, False)
    places = {place.name.rpartition(".")[2] for place in describe(tiny_llama(), own).places}
    assert places == {"q_proj", "k_proj", "v_proj", "o_proj"}
