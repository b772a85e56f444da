"""Expert LoRA is stock peft's LoRA on the same matrices: numbers, merging; and what stock cannot do beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from moe_peft import ExpertLoraConfig, accelerate_expert_lora, describe
from moe_peft.layers import AdaptedExperts, RoutedLayer, RoutedLinear
from tests.backbones.models import tiny_model
from tests.contract.cases import METHODS, adapter_parameters, randomize, tiny_olmoe
from tests.expert_lora_models import BATCH, assert_equal_to, logits_and_gradients, stock_lora
from tests.tiny import tiny_llama, train


def adapted(base: nn.Module | None = None, **fields):
    base = tiny_olmoe().double() if base is None else base
    model = get_peft_model(base, ExpertLoraConfig(**{"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", **fields}))
    randomize(model)
    return model.eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, AdaptedExperts)]


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"target_matrices": ["down"]}, {"target_matrices": ("gate_up",)}]
)
@pytest.mark.parametrize("model_type", [None, "gpt_oss"])
def test_equals_stock_peft_on_the_same_factors(fields, model_type):
    build = (lambda: tiny_olmoe().double()) if model_type is None else (lambda: tiny_model(model_type))
    own = adapted(build(), **fields)
    names = {"gate_up": "gate_up_proj", "down": "down_proj"}
    targets = [f"experts.{names[matrix]}" for matrix in own.peft_config["default"].target_matrices]
    stock = stock_lora(build(), target_parameters=targets, use_rslora=fields.get("use_rslora", False))
    for layer, nest in zip(layers_of(own), _nests(stock), strict=True):
        bank = layer.experts["default"]
        for matrix in bank.matrices:
            A, B = bank.pair(matrix)
            nest[names[matrix]].lora_A["default"].weight.data = A.data.reshape(-1, A.shape[2])
            nest[names[matrix]].lora_B["default"].weight.data = B.data.permute(2, 1, 0).reshape(B.shape[2], -1)
    tolerance = 1e-12 if model_type is None else 1e-5
    found, expected = own(**BATCH).logits, stock(**BATCH).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def _nests(model):
    nests = []
    for layer in model.get_base_model().model.layers:
        nest, module = {}, layer.mlp.experts
        while hasattr(module, "parameter_name"):
            nest[module.parameter_name] = module
            module = module.base_layer
        nests.append(nest)
    return nests


def test_each_layer_is_the_definition_on_what_the_experts_were_called_with():
    model, calls = adapted(experts={"0": [0, 2], "1": [3]}), []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda layer, args, out: calls.append((layer, args, out)))
    model(**BATCH)
    assert len(calls) == 2
    for layer, (x, index, weights), out in calls:
        ids, experts = layer.selections["default"].ids, copy.deepcopy(layer.get_base_layer())
        for name, matrix in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
            A, B = layer.experts["default"].pair(matrix)
            for place, expert in enumerate(ids):
                getattr(experts, name).data[expert] += 5 / 3 * B[place].T @ A[place]
        torch.testing.assert_close(out, experts(x, index, weights), rtol=1e-10, atol=1e-12)


def test_selected_experts_equal_all_experts_with_zero_pairs_elsewhere():
    some = adapted(experts={"0": [1, 3], "1": [0]})
    every = adapted()
    for own, full in zip(layers_of(some), layers_of(every), strict=True):
        for name, parameter in full.experts["default"].named_parameters():
            parameter.data.zero_()
            parameter.data[list(own.selections["default"])] = own.experts["default"].get_parameter(name).data
    torch.testing.assert_close(some(**BATCH).logits, every(**BATCH).logits, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in adapter_parameters(some).values()) * 8 == 3 * sum(
        p.numel() for p in adapter_parameters(every).values()
    )


def test_linear_layers_beside_the_experts_are_plain_lora():
    model = adapted(target_modules=["q_proj", "v_proj"])
    linears = {name: m for name, m in model.named_modules() if isinstance(m, RoutedLinear)}
    assert sorted(name.rpartition(".")[2] for name in linears) == ["q_proj", "q_proj", "v_proj", "v_proj"]
    layer, x = next(iter(linears.values())), torch.randn(4, 32, dtype=torch.float64)
    bank = layer.experts["default"]
    expected = layer.base_layer(x) + 5 / 3 * x @ bank.A[0].T @ bank.B[0]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", r".*\.q_proj", None])
def test_the_experts_are_adapted_whatever_is_named_beside_them(targets, tmp_path):
    model = adapted(target_modules=targets)
    assert len(layers_of(model)) == 2
    assert len([m for m in model.modules() if isinstance(m, RoutedLinear)]) == {
        "all-linear": 8,
        None: 0,
    }.get(targets if not isinstance(targets, list) else "", 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_olmoe().double(), tmp_path)
    assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)


def test_ranks_follow_their_patterns_and_keep_the_scale_of_their_rank():
    model = adapted(target_modules=["q_proj"], rank_pattern={r"layers\.0\.mlp\.experts": 6, "q_proj": 2})
    banks = {name: m.experts["default"] for name, m in model.named_modules() if isinstance(m, RoutedLayer)}
    sizes = {
        name.removeprefix("base_model.model.model."): (bank.A if hasattr(bank, "A") else bank.pair("down")[0]).shape[1]
        for name, bank in banks.items()
    }
    assert sizes == {
        "layers.0.self_attn.q_proj": 2,
        "layers.1.self_attn.q_proj": 2,
        "layers.0.mlp.experts": 6,
        "layers.1.mlp.experts": 3,
    }
    assert all(bank.scaling == 5 / sizes[name.removeprefix("base_model.model.model.")] for name, bank in banks.items())


@pytest.mark.parametrize("matrices", [["gate_up", "down"], ["down"]])
def test_dropout_acts_on_each_pairs_rows_in_training_passes_alone(matrices):
    model = adapted(lora_dropout=0.5, target_matrices=matrices)
    expected = model(**BATCH).logits
    assert torch.equal(model(**BATCH).logits, expected)
    model.train()
    torch.manual_seed(0)
    first = model(**BATCH).logits
    torch.manual_seed(0)
    assert torch.equal(model(**BATCH).logits, first)
    assert not torch.allclose(first, expected) and not torch.allclose(model(**BATCH).logits, first)
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCH).logits, expected, rtol=0, atol=1e-10)


def test_dropout_is_switched_off_as_trainers_do():
    model = adapted(lora_dropout=0.5)
    expected = model(**BATCH).logits
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(model.train()(**BATCH).logits, expected, rtol=0, atol=1e-12)


def double_gpt_oss():
    model = tiny_model("gpt_oss").double()
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    return model


@pytest.mark.parametrize("build", [lambda: tiny_olmoe().double(), double_gpt_oss])
def test_merging_one_of_several_is_exact_and_comes_back(build):
    model = adapted(build())
    model.add_adapter("second", ExpertLoraConfig(r=2, experts={"0": [1], "1": [2, 3]}))
    randomize(model, seed=2)
    model.base_model.set_adapter(["default", "second"])
    expected = model(**BATCH).logits
    base = {name: p.clone() for name, p in layers_of(model)[0].get_base_layer().named_parameters()}
    for names in (["default"], ["second"], ["default", "second"]):
        model.merge_adapter(names)
        torch.testing.assert_close(model(**BATCH).logits, expected, rtol=1e-9, atol=1e-9)
        model.unmerge_adapter()
        for name, parameter in layers_of(model)[0].get_base_layer().named_parameters():
            torch.testing.assert_close(parameter, base[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(model.merge_and_unload()(**BATCH).logits, expected, rtol=1e-9, atol=1e-9)


def test_a_broken_adapter_is_refused_by_a_safe_merge_with_nothing_changed():
    model = adapted()
    layers_of(model)[1].experts["default"].pair("down")[0].data[2, 0, 0] = float("nan")
    before = {name: p.clone() for name, p in model.named_parameters() if "expert_lora" not in name}
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_several_adapters_add_up_and_switch():
    model = adapted()
    base, first = tiny_olmoe().double()(**BATCH).logits, model(**BATCH).logits
    model.add_adapter("second", ExpertLoraConfig(r=2, target_matrices=["down"], init_weights=False))
    assert torch.equal(model(**BATCH).logits, first)
    model.base_model.set_adapter(["default", "second"])
    both = model(**BATCH).logits
    model.set_adapter("second")
    second = model(**BATCH).logits
    assert len({float(x.detach().sum()) for x in (base, first, both, second)}) == 4


def test_an_interrupted_forward_leaves_nothing():
    model = adapted()
    expected, own = model(**BATCH).logits, layers_of(model)[0].get_base_layer()

    def fail(*_):
        raise KeyboardInterrupt

    handle = own.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(**BATCH)
    handle.remove()
    assert "forward" not in own.__dict__ and torch.equal(model(**BATCH).logits, expected)


def test_trains_and_telemetry_sees_the_backbones_routing():
    from moe_peft import telemetry

    model = adapted(tiny_olmoe(), lora_dropout=0.1).train()
    losses = train(model, BATCH)
    assert losses[-1] < losses[0]
    with telemetry.record(model) as meter:
        model.eval()(**BATCH)
    assert meter is not None


def test_compiles_to_one_graph():
    model = adapted(tiny_olmoe().bfloat16(), r=8).bfloat16()
    batch = {"input_ids": BATCH["input_ids"]}
    expected = model(**batch).logits
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


class TestFourBit:
    @pytest.fixture
    def models(self):
        """A model with 4-bit experts, and the model of what they stand for, with the same pairs."""
        pytest.importorskip("bitsandbytes")
        from moe_peft.quantization.four_bit import dequantize_on_read, quantize

        packed, plain = tiny_olmoe(), tiny_olmoe()
        for layer, twin in zip(packed.model.layers, plain.model.layers, strict=True):
            for name in ("gate_up_proj", "down_proj"):
                own = layer.mlp.experts
                dequantize_on_read(own, name, *quantize(getattr(own, name)))
                getattr(twin.mlp.experts, name).data = getattr(own, name).clone()
        return adapted(packed), adapted(plain)

    def test_equals_the_dequantized_model_forward_and_gradient(self, models):
        packed, plain = models
        assert_equal_to(logits_and_gradients(packed), logits_and_gradients(plain), 2e-5)
        one = {"input_ids": BATCH["input_ids"][:1, :1]}
        with torch.no_grad():
            torch.testing.assert_close(packed(**one).logits, plain(**one).logits, rtol=0, atol=1e-5)

    def test_no_stack_is_dequantized_or_kept(self, models, monkeypatch):
        from moe_peft.quantization.four_bit import Dequantize

        monkeypatch.setattr(Dequantize, "forward", lambda *_: pytest.fail("a whole stack was dequantized"))
        logits_and_gradients(models[0])

    def test_merging_is_refused_with_what_to_do(self, models):
        packed, _ = models
        expected = packed(**BATCH).logits
        with pytest.raises(ValueError, match="16 or 32 bit to merge, or keep the adapter"):
            packed.merge_and_unload()
        assert torch.equal(packed(**BATCH).logits, expected)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"r": 0}, "r=0 must be"),
        ({"target_matrices": []}, r"target_matrices=\[\] must be a list of different names among 'gate_up', 'down'"),
        ({"target_matrices": ["up"]}, "target_matrices"),
        ({"target_matrices": ["down", "down"]}, "target_matrices"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": True}}, "rank_pattern"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern"),
        ({"experts": {"x": [1]}}, "experts"),
        ({"experts": {"0": [1]}, "layers_to_transform": [0]}, "layers_to_transform=.* `experts` names the layers"),
        ({"experts_implementation": "eager"}, "experts_implementation"),
        ({"num_experts": 3}, "num_experts=3 must be left at 8: the backbone routes"),
        ({"router": "top_k"}, "the backbone routes"),
        ({"target_parameters": ["x"]}, "target_parameters"),
    ],
)
def test_values_that_cannot_work_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        ExpertLoraConfig(**fields)


@pytest.mark.parametrize(
    ("build", "fields", "match"),
    [
        (tiny_llama, {}, "dense model"),
        (lambda: tiny_model("dbrx"), {}, "two stacks.*PerftConfig"),
        (lambda: tiny_model("jetmoe"), {}, "no experts module that an adapter can follow"),
        (tiny_olmoe, {"experts": {"0": [4]}}, "below 4 in layer 0"),
        (tiny_olmoe, {"experts": {"7": [0]}}, "layer 7 has none"),
        (tiny_olmoe, {"rank_pattern": {"c_proj": 2}}, "none is called 'c_proj'"),
    ],
)
def test_models_that_it_does_not_fit_are_refused_before_anything_is_changed(build, fields, match):
    base = build()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=match):
        get_peft_model(base, ExpertLoraConfig(**fields))
    assert [name for name, _ in base.named_modules()] == before


def test_stock_lora_on_the_same_parameters_is_refused_and_adapters_beside_the_experts_are_not():
    with pytest.raises(ValueError, match="LoRA on its parameters"):
        get_peft_model(accelerate_expert_lora(stock_lora()).base_model.model, ExpertLoraConfig(r=2))
    inner = get_peft_model(tiny_olmoe().double(), METHODS["perft-e"]())
    randomize(inner)
    with pytest.warns(UserWarning, match="adapter of another type"):
        outer = get_peft_model(inner.base_model.model, ExpertLoraConfig(r=2, init_weights=False), adapter_name="outer")
    found = outer(**BATCH).logits
    with outer.disable_adapter():
        assert not torch.equal(outer(**BATCH).logits, found)


def test_what_gives_the_tensors_their_meaning_is_told():
    meaning = ExpertLoraConfig(experts={"0": [1]}, target_modules=["q_proj"], lora_dropout=0.1).meaning()
    assert {"experts", "target_matrices", "rank_pattern", "r", "lora_alpha", "use_rslora"} <= set(meaning)
    assert not {"target_modules", "lora_dropout", "layers_to_transform"} & set(meaning)


def test_describe_counts_the_pairs_and_the_card_says_what_they_are(tmp_path):
    text = str(describe(tiny_olmoe(), ExpertLoraConfig(r=2, experts={"0": [1, 3]})))
    assert "pairs of rank 2 on 2 experts of the backbone" in text and "448" in text
    model = adapted()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Expert LoRA" in card and "import moe_peft" in card


def test_ranks_may_grow_with_the_layers():
    config = ExpertLoraConfig(r=3, per_layer={"r": [2, 4]}, target_modules=["q_proj"], rank_pattern={"1.*q_proj": 5})
    model = get_peft_model(tiny_olmoe(), config)
    ranks = {}
    for layer in (module for module in model.modules() if isinstance(module, RoutedLayer)):
        bank = layer.experts["default"]
        ranks[str(layer.place).partition("layers.")[2]] = rank = next(bank.parameters()).shape[1]
        assert bank.scaling == 32 / rank
    assert ranks == {"0.mlp.experts": 2, "1.mlp.experts": 4, "0.self_attn.q_proj": 2, "1.self_attn.q_proj": 5}
    with pytest.raises(ValueError, match="per_layer"):
        ExpertLoraConfig(per_layer={"num_experts": [2, 4]})
    with pytest.raises(ValueError, match="per_layer"):
        ExpertLoraConfig(per_layer={"r": [2, 0]})
