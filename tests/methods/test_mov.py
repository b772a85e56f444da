"""MoV as an adapter of whole models: its formula, (IA)3 as its special case, its parameters, its fields."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from moe_peft import MovConfig, describe, router_loss
from moe_peft.forward.tracker import find_tracker
from moe_peft.layers import ScaledLinear
from tests import reference
from tests.compare import assert_same
from tests.contract.cases import randomize, tiny_olmoe
from tests.tiny import (
    adapted_linear,
    padded_batch,
    routed_layer_of,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_t5,
)


def config(**fields):
    return MovConfig(**{"num_experts": 4, **fields})


def mov_layer(u, router_input, Wg, vectors, *, top_k=None, normalise=False):
    """u * (1 + sum_e p_e (l_e - 1)) token by token and expert by expert."""
    probs = reference.router_probs(router_input, Wg)
    gates = reference.dense_gates(probs)
    if top_k is not None:
        gates, _ = reference.top_k_gates(probs, top_k, normalise=normalise)
    rows = [u[t] * (1 + sum(g * (vectors[e] - 1) for e, g in gates[t].items())) for t in range(u.shape[0])]
    return torch.stack(rows) if rows else u.clone()


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
@pytest.mark.parametrize("at_input", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "normalise"),
    [(1, None, False), (4, None, False), (4, 1, False), (4, 2, False), (4, 2, True), (4, 4, False)],
)
@pytest.mark.parametrize("router_input", ["activation", "hidden"])
def test_layer_equals_the_formula(num_tokens, at_input, num_experts, top_k, normalise, router_input):
    own = config(num_experts=num_experts, top_k=top_k, norm_topk_prob=normalise, router_input=router_input)
    if at_input:
        own.feedforward_modules = {"linear"}
    model = adapted_linear(own)
    layer = routed_layer_of(model)
    Wg, vectors = layer.router["default"].weight, layer.experts["default"].vectors
    W0 = layer.get_base_layer().weight
    x = torch.randn(num_tokens, 7, dtype=torch.float64, requires_grad=True)
    u = x if at_input else x @ W0.T
    read = x if router_input == "hidden" else u
    expected = mov_layer(u, read, Wg, vectors, top_k=top_k, normalise=normalise)
    leaves = [x, Wg, vectors]
    assert_same(model(x), expected @ W0.T if at_input else expected, leaves, leaves)


def test_zero_router_scales_by_the_mean_vector():
    model = adapted_linear(config())
    layer = routed_layer_of(model)
    nn.init.zeros_(layer.router["default"].weight)
    x = torch.randn(13, 7, dtype=torch.float64)
    torch.testing.assert_close(model(x), layer.base_layer(x) * layer.experts["default"].vectors.mean(0))


def test_permuting_tokens_permutes_outputs():
    model = adapted_linear(config(top_k=2))
    x, order = torch.randn(13, 7, dtype=torch.float64), torch.randperm(13)
    torch.testing.assert_close(model(x[order]), model(x)[order])


def test_one_expert_ignores_heads_and_router():
    models = [
        get_peft_model(tiny_llama(), config(num_experts=1, router_granularity=granularity)).eval()
        for granularity in ("head", "token")
    ]
    for model in models:
        vectors = (p for n, p in model.named_parameters() if "vectors" in n)
        for seed, parameter in enumerate(vectors):
            nn.init.normal_(parameter, mean=1.0, generator=torch.Generator().manual_seed(seed))
    batch = padded_batch([5, 9])
    torch.testing.assert_close(models[0](**batch).logits, models[1](**batch).logits)


@pytest.mark.parametrize("top_k", [{}, {"top_k": 2}, {"top_k": 2, "norm_topk_prob": True}, {"top_k": 1}])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_t5, tiny_bert, tiny_mixtral])
def test_fresh_adapter_is_the_base_bit_for_bit(build, top_k):
    batch = padded_batch([5, 9])
    batch |= {"labels": batch["input_ids"]} if build is tiny_t5 else {}
    base = build().eval().requires_grad_(False)
    expected = base(**batch).logits
    assert torch.equal(get_peft_model(base, config(**top_k))(**batch).logits, expected)


def pair(build):
    """A model with one vector everywhere, and peft's (IA)3 with the same vectors at the same places."""
    ours = get_peft_model(build(), config(num_experts=1)).double().eval()
    randomize(ours)
    resolved = ours.peft_config["default"]
    stock_config = IA3Config(
        target_modules=sorted(resolved.target_modules),
        feedforward_modules=sorted(resolved.feedforward_modules),
        fan_in_fan_out=build is tiny_gpt2,
    )
    stock = get_peft_model(build(), stock_config).double().eval()
    vectors = {}
    for name, layer in ours.base_model.model.named_modules():
        if isinstance(layer, ScaledLinear):
            other = stock.base_model.model.get_submodule(name)
            assert other.is_feedforward == layer.experts["default"].scales_input
            other.ia3_l["default"].data = layer.experts["default"].vectors.data.reshape(other.ia3_l["default"].shape)
            vectors[layer.experts["default"].vectors] = other.ia3_l["default"]
    assert len(vectors) == sum(type(m).__module__.startswith("peft.tuners.ia3") for m in stock.modules()) - 1
    return ours, stock, vectors


@pytest.mark.parametrize("build", [tiny_llama, tiny_t5, tiny_gpt2])
def test_one_vector_equals_ia3_and_merges_alike(build):
    ours, stock, vectors = pair(build)
    batch = padded_batch([5, 9])
    batch["labels"] = batch["input_ids"]
    outputs = [model(**batch) for model in (ours, stock)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(outputs[0].logits, build().double()(**batch).logits)
    for output in outputs:
        output.loss.backward()
    for own, other in vectors.items():
        assert own.grad.abs().sum() > 0
        torch.testing.assert_close(own.grad.flatten(), other.grad.flatten(), rtol=1e-10, atol=1e-14)
    merged = [model.merge_and_unload().state_dict() for model in (ours, stock)]
    assert merged[0].keys() == merged[1].keys()
    for name, tensor in merged[0].items():
        torch.testing.assert_close(tensor, merged[1][name], rtol=1e-14, atol=0)


# T5 v1.1: (d_model, d_ff, layers of a stack, heads).
VOCABULARY = 32128
SIZES = {"xl": (2048, 5120, 24, 32), "xxl": (4096, 10240, 24, 64)}


def t5(size: str) -> T5ForConditionalGeneration:
    d_model, d_ff, num_layers, num_heads = SIZES[size]
    shape = {"d_model": d_model, "d_ff": d_ff, "d_kv": 64, "num_layers": num_layers, "num_heads": num_heads}
    with torch.device("meta"):
        return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, feed_forward_proj="gated-gelu", **shape))


def count(size: str, num_experts: int, **fields) -> tuple[int, float]:
    description = describe(t5(size), MovConfig(num_experts=num_experts, **fields))
    # transformers ties the output head to the embeddings, which version 1.1 keeps apart.
    base_parameters = description.base_parameters + VOCABULARY * SIZES[size][0]
    return description.num_parameters, 100 * description.num_parameters / base_parameters


def test_parameters_of_t5_are_those_of_the_released_code():
    d_model, d_ff, layers, heads = SIZES["xl"]
    keys_and_values, ffns = 2 * 3 * layers, 2 * layers  # self-attention of both stacks, and cross-attention
    ia3 = keys_and_values * heads * 64 + ffns * d_ff
    assert ia3 == 540_672
    routers = keys_and_values * 64 + ffns * d_ff
    assert count("xl", 10)[0] == 10 * (ia3 + routers)
    assert round(count("xl", 10)[1], 3) == 0.279
    assert round(count("xxl", 60)[1], 3) == 0.852
    by_hidden = keys_and_values * d_model + ffns * d_ff
    assert count("xl", 10, router_input="hidden")[0] == 10 * (ia3 + by_hidden)


def test_saved_adapter_comes_back_with_its_heads_and_places(tmp_path):
    batch = padded_batch([5, 9])
    model = get_peft_model(tiny_llama(), config()).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(stored["feedforward_modules"]) == ["down_proj"] and stored["head_dim"] is None
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    shapes = {n.rpartition("self_attn.")[2]: p.shape for n, p in loaded.named_parameters() if "_router." in n}
    assert shapes["k_proj.mov_router.default.weight"] == (4, 8)  # one router for heads of width 8


def test_one_configuration_serves_models_of_different_heads():
    own = config(target_modules=["k_proj"])
    for heads, width in ((4, 8), (8, 4)):
        model = get_peft_model(tiny_llama(num_attention_heads=heads), copy.deepcopy(own))
        widths = {p.shape[1] for n, p in model.named_parameters() if "_router." in n}
        assert widths == {width}


def test_head_dim_overrules_the_model_and_must_divide():
    widths = {
        p.shape[1] for n, p in get_peft_model(tiny_llama(), config(head_dim=4)).named_parameters() if "_router" in n
    }
    assert widths == {4, 48}
    with pytest.raises(
        ValueError, match=r"head_dim=5 does not divide the 16 outputs of model.layers.0.self_attn.k_proj"
    ):
        get_peft_model(tiny_llama(), config(head_dim=5))


def test_output_is_independent_of_batch_neighbours():
    model = get_peft_model(tiny_llama(), config()).double().eval()
    randomize(model)
    ids = padded_batch([7, 7, 7])["input_ids"]
    together = model(input_ids=ids).logits
    for row in range(3):
        torch.testing.assert_close(model(input_ids=ids[row : row + 1]).logits[0], together[row])


def test_description_says_what_fused_experts_keep_out_of_reach():
    text = str(describe(tiny_olmoe(), config()))
    assert "not inside the experts of 2 layers" in text and "down_proj" not in text
    assert "not inside" not in str(describe(tiny_llama(), config()))


def test_all_linear_scales_every_linear_layer():
    names = {
        place.name.rpartition(".")[2] for place in describe(tiny_llama(), config(target_modules="all-linear")).places
    }
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_queries_are_routed_as_a_whole():
    model = get_peft_model(tiny_llama(), config(target_modules=["q_proj", "v_proj"]))
    heads = {
        n.rpartition(".")[2]: m.experts["default"].num_heads
        for n, m in model.named_modules()
        if isinstance(m, ScaledLinear)
    }
    assert heads == {"q_proj": 1, "v_proj": 2}


def test_there_is_no_router_loss_by_default():
    model = adapted_linear(config())
    model(torch.randn(13, 7, dtype=torch.float64))
    assert router_loss(model) == 0 and not find_tracker(model).latest.layers


def test_defaults_are_the_papers():
    own = MovConfig()
    assert (own.num_experts, own.router, own.top_k, own.router_input, own.router_granularity) == (
        *(10, "dense", None, "activation", "head"),
    )
    model = get_peft_model(tiny_t5(d_model=400, d_ff=600), MovConfig(num_experts=20))
    routers = torch.cat([p.flatten() for n, p in model.named_parameters() if "_router." in n])
    assert abs(routers.std().item() - 0.02) < 0.001 and abs(routers.mean().item()) < 0.001
    assert not any("bias" in n for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "capacity", "top_k": 2}, "router='capacity' must be one of 'dense', 'top_k'"),
        ({"init_weights": "gaussian"}, "init_weights='gaussian' must be one of True, False"),
        ({"r": 8}, "r=8 must be left at 4: vectors have no rank"),
        ({"router_input": "query"}, "router_input='query' must be one of 'activation', 'hidden'"),
        ({"router_granularity": "layer"}, "router_granularity='layer' must be one of 'head', 'token'"),
        ({"head_dim": 0}, "head_dim=0 must be a positive number or None"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MovConfig(**fields)


def test_feedforward_modules_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match=r"feedforward_modules=\{'down_prj'\} must be None, or names.*'down_proj'"):
        get_peft_model(tiny_llama(), config(feedforward_modules=["down_prj"]))
    own = config(feedforward_modules=r".*\.mlp\.down_proj", target_modules=["down_proj", "v_proj"])
    sides = {p.name.rpartition(".")[2]: own.scales_input(p.name) for p in describe(tiny_llama(), own).places}
    assert sides == {"down_proj": True, "v_proj": False}


def test_vectors_of_a_sixteen_bit_model_are_not_rounded(tmp_path):
    model = get_peft_model(tiny_llama().bfloat16(), config())
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = tiny_llama().bfloat16()
    loaded.load_adapter(str(tmp_path))
    plain = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path, autocast_adapter_dtype=False)
    cast = copy.deepcopy(model).bfloat16()
    for other in (loaded, plain, cast):
        found = [p for n, p in other.named_parameters() if n.endswith(".vectors")]
        expected = [p for n, p in model.named_parameters() if n.endswith(".vectors")]
        assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))
