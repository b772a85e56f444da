"""Life of experts' copies on one model: several adapters, merging, disabling, compiled, quantized and hooked bases."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from moe_peft import EsftConfig, MoePeftWarning, telemetry
from moe_peft.layers import SlicedExperts
from tests.methods.sparse_models import (
    EXPERTS,
    IMPLEMENTATIONS,
    experts_modules,
    randomize_copies,
    sparse_model,
    token_batch,
)

OTHER = {"0": [0, 2], "1": [5]}


def config(experts=EXPERTS, **fields):
    return EsftConfig(task_type="CAUSAL_LM", experts=experts, **fields)


def adapted(kind: str = "olmoe", implementation: str = "eager", experts=EXPERTS, **fields):
    """A model with random copies, and the frozen model it was made from."""
    base = sparse_model(kind, implementation, **fields).requires_grad_(False)
    model = get_peft_model(copy.deepcopy(base), config(experts)).eval()
    randomize_copies(model)
    return model, base


def logits(model, **options):
    with torch.no_grad():
        return model(**token_batch(), **options).logits


def first_layer(model) -> SlicedExperts:
    return next(module for module in model.modules() if isinstance(module, SlicedExperts))


def replaced(base, model, adapters=("default",)):
    """The base model with the copies written over its experts by hand."""
    twin = copy.deepcopy(base)
    layers = [module for module in model.modules() if isinstance(module, SlicedExperts)]
    for module, layer in zip(experts_modules(twin), layers, strict=True):
        for adapter in adapters:
            for name, parameter in layer.experts[adapter].named_parameters():
                getattr(module, name).data[list(layer.selections[adapter])] = parameter.data
    return twin


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "nemotron_h"])
def test_output_is_that_of_a_model_whose_experts_are_replaced(kind, implementation):
    model, base = adapted(kind, implementation)
    expected = logits(replaced(base, model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(base), atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


def test_adapters_switch_and_are_deleted_and_disjoint_ones_act_together(tmp_path):
    model, base = adapted()
    model.save_pretrained(tmp_path)
    first = logits(model)
    model.add_adapter("other", config(OTHER))
    copies = dict(first_layer(model).experts["other"].named_parameters())
    for name, tensor in experts_modules(base)[0].named_parameters():
        assert torch.equal(copies[name], tensor[OTHER["0"]])
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.data *= 1.5
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), logits(replaced(base, model, ["other"])), rtol=1e-4, atol=1e-4)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    torch.testing.assert_close(both, logits(replaced(base, model, ["default", "other"])), rtol=1e-4, atol=1e-4)
    model(**token_batch()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "_experts." in n)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), both, rtol=1e-4, atol=1e-4)

    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert torch.equal(logits(model), first)


def test_active_adapters_that_replace_one_expert_twice_are_refused():
    model, _ = adapted()
    model.add_adapter("other", config({"0": [3, 5], "1": [1]}))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"both replace the experts \[3\] of model.layers.0.mlp.experts"):
        logits(model)
    with pytest.raises(ValueError, match=r"both replace the experts \[3\]"):
        model.merge_and_unload()


def test_an_adapter_of_another_kind_cannot_share_a_module():
    model, _ = adapted()
    expected = logits(model)
    with pytest.raises(ValueError, match="is a SlicedExperts; this one needs a RoutedExperts"):
        model.add_adapter("other", config({"1": [3]}, expert_adapter="lora"))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_merging_is_index_assignment_and_unmerging_restores_every_bit(kind):
    model, base = adapted(kind)
    before = logits(model)
    model.merge_adapter()
    wanted = dict(replaced(base, model).named_parameters())
    for name, parameter in model.base_model.model.named_parameters():
        if "esft" not in name:
            assert torch.equal(parameter, wanted[name.replace("base_layer.", "")]), name
    assert torch.equal(logits(model), logits(replaced(base, model)))
    model.unmerge_adapter()
    for name, parameter in base.named_parameters():
        found = model.base_model.model.get_parameter(name.replace("mlp.experts.", "mlp.experts.base_layer."))
        assert torch.equal(found, parameter), name
    assert torch.equal(logits(model), before)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), before)


def test_a_new_adapter_copies_the_backbones_experts_not_merged_ones():
    model, base = adapted()
    model.merge_adapter()
    with pytest.warns(MoePeftWarning, match="a new one copies its experts from. Unmerging"):
        model.add_adapter("other", config({"0": [1, 2], "1": [2, 7]}))
    model.set_adapter("other")
    for name, tensor in experts_modules(base)[0].named_parameters():
        assert torch.equal(first_layer(model).experts["other"].get_parameter(name), tensor[[1, 2]])
    torch.testing.assert_close(logits(model), logits(base), rtol=1e-5, atol=1e-5)


def test_copies_that_are_not_finite_are_not_merged():
    model, base = adapted()
    first_layer(model).experts["default"].down_proj.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(first_layer(model).base_layer.down_proj, experts_modules(base)[0].down_proj)


def test_one_model_serves_one_adapter_at_a_time():
    model, _ = adapted()
    with pytest.raises(ValueError, match="cannot be mixed in a batch"):
        model(**token_batch(), adapter_names=["default", "__base__", "default"])


@pytest.mark.parametrize(("kind", "implementation"), [("olmoe", "grouped_mm"), ("gpt_oss", "batched_mm")])
def test_one_compiled_graph_gives_the_same_outputs_and_gradients(kind, implementation):
    model, _ = adapted(kind, implementation)
    model.train()
    batch = token_batch()
    outputs, grads = [], []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        output = call(**batch)
        output.loss.backward()
        outputs.append(output.logits.detach())
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sixteen_bit_base_computes_with_rounded_copies_and_autocast_with_the_backbones_precision(implementation):
    base = sparse_model("olmoe", implementation).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(base)
        found = logits(get_peft_model(copy.deepcopy(base), config()).eval())
    # Experts are added up in another order, which rounding to 16 bits shows.
    assert (found - expected).norm() <= 0.05 * expected.norm()
    half = get_peft_model(base.to(torch.bfloat16), config()).eval()
    assert {p.dtype for n, p in half.named_parameters() if "esft" in n} == {torch.float32}
    before = logits(half)
    assert before.dtype == torch.bfloat16
    for name, parameter in half.named_parameters():
        if "esft" in name:
            parameter.data += 1e-6 * parameter.data.abs()  # less than rounding
    assert torch.equal(logits(half), before)


def test_replaced_forwards_and_hooks_of_the_experts_run_once_for_the_frozen_ones():
    model, _ = adapted()
    expected = logits(model)
    base, calls = first_layer(model).base_layer, []
    inner = base.forward
    base.forward = lambda *args, **kwargs: (calls.append("forward"), inner(*args, **kwargs))[1]
    base.register_forward_pre_hook(lambda *_: calls.append("hook"))
    assert torch.equal(logits(model), expected)
    assert calls == ["hook", "forward"]
    assert base.num_experts == 8 and len(base.gate_up_proj) == 8


def test_slots_without_an_expert_stay_without_one():
    model, _ = adapted()
    layer = first_layer(model)
    generator = torch.Generator().manual_seed(0)
    hidden, weights = torch.randn(5, 32, generator=generator), torch.rand(5, 3, generator=generator)
    index = torch.tensor([[1, 8, 0], [8, 8, 8], [3, 6, 8], [2, 4, 8], [8, 1, 3]])
    expected = layer(hidden, index.masked_fill(index == 8, 0), weights.masked_fill(index == 8, 0.0))
    torch.testing.assert_close(layer(hidden, index, weights), expected, rtol=1e-5, atol=1e-6)
    assert not layer(hidden, index, weights)[1].any()


def test_every_copy_gets_a_gradient_in_a_step_that_sends_nothing_there():
    model, _ = adapted()
    used = set()
    first_layer(model).base_layer.register_forward_pre_hook(lambda _, args: used.update(args[1].flatten().tolist()))
    batch = token_batch(rows=1, length=2)
    model(**batch)
    unused = sorted(set(range(8)) - used)
    model.add_adapter("unused", config({"0": unused}))
    model.set_adapter("unused")
    model(**batch).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if ".unused." in n]
    assert unused and len(gradients) == 2
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_the_routing_of_the_backbone_is_what_the_layer_reports():
    model, base = adapted(experts={"1": [2]})
    seen = []
    experts_modules(base)[1].register_forward_pre_hook(lambda module, args: seen.append(args))
    with telemetry.record(model) as routings:
        logits(model)
    logits(base)
    ((_, index, weights),) = seen
    (routing,) = routings["model.layers.1.mlp.experts"]
    assert torch.equal(routing.experts, index) and torch.equal(routing.weights, weights)
    assert routing.num_experts == 8


def quantized(model):
    """Fused experts in four bits, as bitsandbytes stores them."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for module in experts_modules(model):
        for name in [name for name, p in module.named_parameters(recurse=False) if p.dim() == 3]:
            replace_parameter_4bit(module, name, quant_type="nf4")
    return model


@pytest.mark.bnb
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_copies_train_beside_quantized_experts_and_come_back(kind, implementation, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = quantized(sparse_model(kind, implementation).requires_grad_(False))
    dense = experts_modules(base)[0].gate_up_proj.clone()
    expected = logits(base)
    model = get_peft_model(base, config())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    layer = first_layer(model)
    assert torch.equal(layer.experts["default"].gate_up_proj, dense[EXPERTS["0"]])
    assert layer.experts["default"].gate_up_proj.dtype == torch.float32
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(6):
        loss = model.train()(**token_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(layer.base_layer.gate_up_proj, dense)
    found = logits(model.eval())
    with pytest.raises(ValueError, match="are quantized, so trained ones cannot be written into them"):
        model.merge_and_unload()
    assert torch.equal(logits(model), found)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(quantized(sparse_model(kind, implementation).requires_grad_(False)), tmp_path)
    state = again.eval().state_dict()
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters() if "esft" in name)
    assert torch.equal(logits(again), found)
