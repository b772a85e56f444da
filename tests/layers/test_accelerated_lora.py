"""Stock LoRA on fused experts is the same adapter accelerated: outputs, gradients, files, and every call of peft."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import nn

from moe_peft import MoePeftWarning, accelerate_expert_lora, expert_parameters
from moe_peft.layers import accelerated_lora
from moe_peft.layers.accelerated_lora import AcceleratedParamWrapper
from tests.backbones.models import tiny_model
from tests.contract.cases import tiny_olmoe
from tests.expert_lora_models import (
    BATCH,
    assert_equal_to,
    experts_of,
    fill,
    logits_and_gradients,
    stock_config,
    stock_lora,
)


@pytest.fixture
def passes(monkeypatch):
    """Experts modules that ran the pass, in order."""
    ran = []
    run = accelerated_lora._run
    monkeypatch.setattr(
        accelerated_lora, "_run", lambda experts, *args, **kw: (ran.append(experts), run(experts, *args, **kw))[1]
    )
    return ran


def wrappers_of(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"gate_up_proj": 5}, "alpha_pattern": {"down_proj": 2}},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"target_modules": ["q_proj", "v_proj"]},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_equals_stock_forward_and_gradient(overrides, passes):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*did not match.*")
        model = stock_lora(**overrides)
    expected = logits_and_gradients(model)
    assert accelerate_expert_lora(model) is model
    assert_equal_to(logits_and_gradients(model), expected)
    assert len(passes) == 2
    accelerate_expert_lora(model, False)
    assert_equal_to(logits_and_gradients(model), expected, 0)
    assert len(passes) == 2


@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h", "longcat_flash", "gemma4_text"])
def test_equals_stock_in_float32_on_other_layouts(model_type, passes):
    model = stock_lora(tiny_model(model_type))
    expected = logits_and_gradients(model)
    accelerate_expert_lora(model)
    assert_equal_to(logits_and_gradients(model), expected, 2e-5)
    assert passes


@pytest.mark.parametrize("reentrant", [True, False])
def test_equals_stock_under_checkpointing(reentrant, passes):
    model = stock_lora().train()
    expected = logits_and_gradients(model)
    accelerate_expert_lora(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal_to(logits_and_gradients(model), expected)
    assert len(passes) == 4


def test_generation_equals_stock():
    model = stock_lora()
    batch = {name: value[:1] for name, value in BATCH.items()}
    expected = model.generate(**batch, max_new_tokens=8, do_sample=False)
    accelerate_expert_lora(model)
    assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), expected)


def test_16_bit_model_with_float32_adapters_trains_as_stock():
    model = stock_lora(tiny_olmoe().bfloat16())
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}
    expected = logits_and_gradients(model)
    accelerate_expert_lora(model)
    found = logits_and_gradients(model)
    assert all(g.dtype == torch.float32 for g in found[1].values())
    assert_equal_to(found, expected, 0.1)


def test_autocast_changes_nothing_that_it_does_not_change_in_stock():
    model = stock_lora(tiny_olmoe())
    model.get_base_model().set_experts_implementation("grouped_mm")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**BATCH).logits
        accelerate_expert_lora(model)
        torch.testing.assert_close(model(**BATCH).logits, expected, rtol=0.02, atol=0.02)


class TestSeveralAdapters:
    def model(self):
        model = stock_lora()
        model.add_adapter("second", stock_config(model.get_base_model(), r=2, lora_alpha=3))
        fill(model, seed=2)
        return model

    @pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"]])
    def test_active_ones_add_up_as_in_stock(self, active):
        model = self.model()
        model.base_model.set_adapter(active)
        expected = logits_and_gradients(model)
        accelerate_expert_lora(model)
        assert_equal_to(logits_and_gradients(model), expected)

    def test_switching_disabling_and_deleting_equal_stock(self):
        stock, fast = self.model(), accelerate_expert_lora(self.model())
        seen = []
        for model in (stock, fast):
            outs = []
            model.set_adapter("second")
            outs.append(model(**BATCH).logits)
            with model.disable_adapter():
                outs.append(model(**BATCH).logits)
            model.set_adapter("default")
            outs.append(model(**BATCH).logits)
            model.delete_adapter("second")
            outs.append(model(**BATCH).logits)
            seen.append(outs)
        assert len({float(out.sum()) for out in seen[0]}) == 3
        for expected, found in zip(*seen, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    def test_adapters_added_and_loaded_afterwards_are_accelerated_too(self, tmp_path, passes):
        stock = self.model()
        stock.save_pretrained(tmp_path)
        fast = accelerate_expert_lora(stock_lora())
        fast.add_adapter("second", stock_config(fast.get_base_model(), r=2, lora_alpha=3))
        fast.load_adapter(tmp_path / "second", "third")
        for name in ("second", "third"):
            fast.set_adapter(name)
            stock.set_adapter("second")
            if name == "third":
                expected, passes[:] = logits_and_gradients(stock)[0], []
                torch.testing.assert_close(fast(**BATCH).logits, expected, rtol=0, atol=1e-12)
                assert len(passes) == 2
        assert all(type(wrapper) is AcceleratedParamWrapper for wrapper in wrappers_of(fast))


@pytest.mark.parametrize("safe", [True, False])
def test_merging_and_unloading_equal_stock(safe):
    stock, fast = stock_lora(), accelerate_expert_lora(stock_lora())
    expected = stock(**BATCH).logits
    for model in (stock, fast):
        model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(fast(**BATCH).logits, expected, rtol=0, atol=1e-12)
    fast.unmerge_adapter()
    torch.testing.assert_close(fast(**BATCH).logits, expected, rtol=0, atol=1e-12)
    merged = fast.merge_and_unload(safe_merge=safe)
    assert not wrappers_of(merged) and "forward" not in merged.model.layers[0].mlp.experts.__dict__
    torch.testing.assert_close(merged(**BATCH).logits, expected, rtol=0, atol=1e-12)
    bare = accelerate_expert_lora(stock_lora()).unload()
    assert torch.equal(bare(**BATCH).logits, tiny_olmoe().double()(**BATCH).logits)


def test_files_are_those_of_stock_and_load_into_either(tmp_path):
    model = stock_lora()
    expected, keys = model(**BATCH).logits, list(model.state_dict())
    model.save_pretrained(tmp_path / "stock")
    accelerate_expert_lora(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "fast")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()
    assert load_file(tmp_path / "fast" / "adapter_model.safetensors")
    loaded = accelerate_expert_lora(PeftModel.from_pretrained(tiny_olmoe().double(), tmp_path / "fast"))
    torch.testing.assert_close(loaded(**BATCH).logits, expected, rtol=0, atol=1e-12)


def test_copies_and_pickles_stay_accelerated(passes):
    model = accelerate_expert_lora(stock_lora())
    expected = model(**BATCH).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        passes.clear()
        assert torch.equal(other(**BATCH).logits, expected)
        assert len(passes) == 2 and passes[0] is experts_of(other) is not experts_of(model)


def test_works_on_a_transformers_model_that_was_given_an_adapter(passes):
    base = tiny_olmoe().double()
    base.add_adapter(stock_config(base))
    fill(base)
    expected = logits_and_gradients(base)
    accelerate_expert_lora(base)
    assert_equal_to(logits_and_gradients(base), expected)
    assert len(passes) == 2


def test_hooks_of_the_experts_and_of_every_wrapper_fire_once(passes):
    model = accelerate_expert_lora(stock_lora())
    seen = []
    first = model.get_base_model().model.layers[0].mlp.experts
    for name, module in (("outer", first), ("inner", first.base_layer), ("experts", experts_of(model))):
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(f"before {name}"))
        module.register_forward_hook(lambda *_, name=name: seen.append(f"after {name}"))
    model(**BATCH)
    order = ["outer", "inner", "experts"]
    assert seen == [f"before {name}" for name in order] + [f"after {name}" for name in reversed(order)]


@pytest.mark.parametrize("accelerated_first", [True, False])
def test_offloaded_experts_arrive(accelerated_first, passes):
    model = stock_lora(tiny_olmoe())
    expected = model(**BATCH).logits
    if accelerated_first:
        accelerate_expert_lora(model)
    for layer in model.get_base_model().model.layers:
        own = layer.mlp.experts.get_base_layer()
        cpu_offload(own, execution_device=torch.device("cpu"))
        assert own.gate_up_proj.is_meta
    accelerate_expert_lora(model)
    torch.testing.assert_close(model(**BATCH).logits, expected, rtol=0, atol=1e-5)
    assert len(passes) == 2
    assert experts_of(model).gate_up_proj.is_meta


def test_hooks_of_accelerate_stay_on_the_module():
    model = accelerate_expert_lora(stock_lora())
    expected = model(**BATCH).logits
    own = experts_of(model)
    add_hook_to_module(own, AlignDevicesHook(execution_device="cpu"))
    kept = own.__dict__["_old_forward"]
    assert torch.equal(model(**BATCH).logits, expected)
    assert own.__dict__["_old_forward"] is kept


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_forward_leaves_nothing(error):
    model = accelerate_expert_lora(stock_lora())
    expected, own = model(**BATCH).logits, experts_of(model)

    def fail(*_):
        raise error

    handle = own.register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(**BATCH)
    handle.remove()
    assert "forward" not in own.__dict__
    assert torch.equal(model(**BATCH).logits, expected)


def test_a_forward_of_the_model_inside_its_own_is_a_forward_of_its_own():
    model = accelerate_expert_lora(stock_lora())
    expected, inside = model(**BATCH).logits, []

    def again(*_):
        if not inside:
            inside.append(None)
            inside[0] = model(**BATCH).logits

    handle = experts_of(model).register_forward_pre_hook(again)
    assert torch.equal(model(**BATCH).logits, expected)
    handle.remove()
    assert torch.equal(inside[0], expected)


def test_threads_at_the_same_time_compute_what_each_computes_alone():
    model = accelerate_expert_lora(stock_lora())
    batches = [{name: value.roll(shift, 1) for name, value in BATCH.items()} for shift in range(4)]
    expected = [model(**batch).logits for batch in batches]
    wrong, barrier = [], threading.Barrier(4)

    def work(number):
        barrier.wait()
        for _ in range(15):
            if not torch.equal(model(**batches[number]).logits, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and "forward" not in experts_of(model).__dict__


def test_the_experts_called_past_their_wrappers_are_the_backbones_own():
    model = accelerate_expert_lora(stock_lora())
    own, base = experts_of(model), experts_of(stock_lora())
    call = torch.randn(3, 32, dtype=torch.float64), torch.tensor([[0, 1], [2, 3], [1, 3]]), torch.rand(3, 2).double()
    assert torch.equal(own(*call), base(*call))


def test_nothing_of_peft_is_changed_for_other_models():
    before = {name: getattr(ParamWrapper, name) for name in ("forward", "_activate_lora", "merge", "update_layer")}
    accelerate_expert_lora(stock_lora())
    assert all(getattr(ParamWrapper, name) is value for name, value in before.items())
    assert all(type(wrapper) is ParamWrapper for wrapper in wrappers_of(stock_lora()))


def test_compiles_to_one_graph_with_gradients_in_16_bit():
    model = stock_lora(tiny_olmoe().bfloat16(), r=8).bfloat16()
    accelerate_expert_lora(model)
    batch = {"input_ids": BATCH["input_ids"]}
    expected = model(**batch).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if ".lora_" in n)


def test_compiled_hooks_on_the_experts_fire():
    model = accelerate_expert_lora(stock_lora(tiny_olmoe()))
    expected, seen = model(input_ids=BATCH["input_ids"]).logits, []
    experts_of(model).register_forward_hook(lambda *_: seen.append(None))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(input_ids=BATCH["input_ids"]).logits, expected, rtol=0, atol=1e-5)
    assert seen


def test_stock_alone_runs_where_an_adapter_is_on_a_bias_and_one_warning_says_so(passes):
    base = tiny_model("gpt_oss")
    names = [*expert_parameters(base), "layers.0.mlp.experts.down_proj_bias"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[], target_parameters=names)).eval()
    fill(model)
    expected = model(**BATCH).logits
    with pytest.warns(MoePeftWarning, match=r"1 of 2 .*layers\.0\.mlp\.experts.*down_proj_bias") as caught:
        accelerate_expert_lora(model)
    assert len([w for w in caught if w.category is MoePeftWarning]) == 1
    torch.testing.assert_close(model(**BATCH).logits, expected, rtol=0, atol=1e-5)
    assert len(passes) == 1


@pytest.mark.parametrize("model_type", ["llama4_text", "jetmoe"])
def test_experts_of_another_form_stay_stock_with_a_warning(model_type):
    model = stock_lora(tiny_model(model_type))
    expected = model(**BATCH).logits
    with pytest.warns(MoePeftWarning, match="run as in stock peft"):
        accelerate_expert_lora(model)
    assert not any(isinstance(wrapper, AcceleratedParamWrapper) for wrapper in wrappers_of(model))
    assert torch.equal(model(**BATCH).logits, expected)


def test_a_model_without_such_adapters_is_refused_with_what_to_write():
    for model in (tiny_olmoe(), get_peft_model(tiny_olmoe(), LoraConfig(r=2, target_modules=["q_proj"]))):
        with pytest.raises(ValueError, match=r"expert_parameters\(model\)"):
            accelerate_expert_lora(model)


def test_four_bit_experts_train_on_every_pair_where_the_parameters_are_named_in_full():
    pytest.importorskip("bitsandbytes")
    from moe_peft.quantization.four_bit import dequantize_on_read, quantize

    base, plain = tiny_olmoe(), tiny_olmoe()
    names = []
    for number, layer in enumerate(base.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            own = layer.mlp.experts
            dequantize_on_read(own, name, *quantize(getattr(own, name)))
            getattr(plain.model.layers[number].mlp.experts, name).data = getattr(own, name).clone()
            names.append(f"model.layers.{number}.mlp.experts.{name}")
    model = accelerate_expert_lora(stock_lora(base, target_parameters=names))
    other = stock_lora(plain)
    for wrapper, twin in zip(_by_matrix(model), _by_matrix(other), strict=True):
        for name in ("lora_A", "lora_B"):
            getattr(twin, name)["default"].weight.data = getattr(wrapper, name)["default"].weight.data.clone()
    torch.testing.assert_close(model(**BATCH).logits, other(**BATCH).logits, rtol=0, atol=1e-5)
    _, gradients = logits_and_gradients(model)
    assert len(gradients) == 8 and all(g.any() for g in gradients.values())


def _by_matrix(model):
    """Wrappers by layer and matrix, whichever stands inside the other."""
    named = [
        (name.replace(".base_layer", ""), m.parameter_name, m)
        for name, m in model.named_modules()
        if isinstance(m, ParamWrapper)
    ]
    return [wrapper for *_, wrapper in sorted(named, key=lambda own: own[:2])]


class OwnFormula(nn.Module):
    """Experts without the flags of transformers' interface, whose activation is clamped."""

    def __init__(self, limit):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 6))
        self.act_fn, self.limit = nn.SiLU(), limit

    def forward(self, hidden, index, weights):
        out = torch.zeros_like(hidden)
        for token, experts in enumerate(index.tolist()):
            for slot, expert in enumerate(experts):
                gate, up = (self.gate_up_proj[expert] @ hidden[token]).chunk(2)
                inner = self.act_fn(gate) * up
                inner = inner if self.limit is None else inner.clamp(max=self.limit)
                out[token] += weights[token, slot] * (self.down_proj[expert] @ inner)
        return out


class Own(nn.Module):
    def __init__(self, limit):
        super().__init__()
        self.experts = OwnFormula(limit)

    def forward(self, *call):
        return self.experts(*call)


@pytest.mark.parametrize("limit", [None, 7.0])
def test_a_formula_of_their_own_is_found_out_by_a_trial(limit, passes):
    torch.manual_seed(0)
    model = Own(limit)
    call = torch.randn(3, 8), torch.tensor([[0, 1], [2, 3], [1, 3]]), torch.rand(3, 2)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"]))
    fill(model)
    expected = model(*call)
    if limit is None:
        accelerate_expert_lora(model)
    else:
        with pytest.warns(MoePeftWarning, match="in a way of its own"):
            accelerate_expert_lora(model)
    torch.testing.assert_close(model(*call), expected, rtol=1e-4, atol=1e-4)
    assert bool(passes) is (limit is None)
