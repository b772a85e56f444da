"""Adapters in the files of others: what stock peft loads and merges, and what serving engines load, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moe_peft import ExpertLoraConfig, LoraMoeConfig
from moe_peft.tools import export_expert_lora, export_per_expert, import_expert_lora
from tests.backbones.models import tiny_model
from tests.contract.cases import adapter_parameters, randomize, tiny_olmoe
from tests.expert_lora_models import BATCH, stock_lora

BUILDS = {
    "olmoe": lambda: tiny_olmoe().double(),
    "gpt_oss": lambda: tiny_model("gpt_oss"),
    "nemotron_h": lambda: tiny_model("nemotron_h"),
    "longcat_flash": lambda: tiny_model("longcat_flash"),
}


def adapted(base, **fields):
    model = get_peft_model(base, ExpertLoraConfig(**{"r": 3, "lora_alpha": 5, **fields}))
    randomize(model)
    return model.eval()


def close(found, expected):
    tolerance = 1e-12 if expected.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("model_type", BUILDS)
def test_stock_peft_loads_and_merges_an_exported_adapter(model_type, tmp_path):
    model = adapted(BUILDS[model_type]())
    export_expert_lora(model, tmp_path)
    stock = PeftModel.from_pretrained(BUILDS[model_type](), tmp_path).eval()
    expected = model(**BATCH).logits
    close(stock(**BATCH).logits, expected)
    close(stock.merge_and_unload()(**BATCH).logits, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_matrices": ["down"]},
        {"experts": {"0": [1, 3], "1": [0]}},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"rank_pattern": {"layers.0.mlp.experts": 2, "q_proj": 5}, "target_modules": ["q_proj"]},
    ],
)
def test_selections_linear_layers_and_ranks_are_exported_too(fields, tmp_path):
    model = adapted(BUILDS["olmoe"](), **fields)
    export_expert_lora(model, tmp_path)
    stock = PeftModel.from_pretrained(BUILDS["olmoe"](), tmp_path)
    close(stock(**BATCH).logits, model(**BATCH).logits)


@pytest.mark.parametrize("targets", [[], ["q_proj"]])
def test_round_trips_are_equal_to_the_last_bit(targets, tmp_path):
    stock = stock_lora(target_modules=targets)
    stock.save_pretrained(tmp_path / "stock")
    own = import_expert_lora(tiny_olmoe().double(), tmp_path / "stock")
    close(own.eval()(**BATCH).logits, stock(**BATCH).logits)
    export_expert_lora(own, tmp_path / "again")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stock", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    third = import_expert_lora(tiny_olmoe().double(), tmp_path / "again")
    for one, other in zip(adapter_parameters(own).values(), adapter_parameters(third).values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_tensors_of_each_expert_are_the_fused_change(model_type, tmp_path):
    model = adapted(BUILDS[model_type]())
    export_per_expert(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = model.get_base_model().model.layers[1].mlp.experts
    bank, experts = layer.experts["default"], layer.get_base_layer()
    for expert in range(bank.num_experts):
        key = f"base_model.model.model.layers.1.mlp.experts.{expert}"
        change = {
            name: bank.scaling * tensors[f"{key}.{name}.lora_B.weight"] @ tensors[f"{key}.{name}.lora_A.weight"]
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        torch.testing.assert_close(change["down_proj"], bank.delta("down", expert).T.to(change["down_proj"]))
        fused = bank.delta("gate_up", expert).T.to(change["gate_proj"])
        halves = fused.chunk(2) if experts.is_concatenated else (fused[::2], fused[1::2])
        torch.testing.assert_close(change["gate_proj"], halves[0])
        torch.testing.assert_close(change["up_proj"], halves[1])
    assert len(tensors) == 2 * bank.num_experts * 6


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True, "target_modules": ["q_proj"]},
        {"rank_pattern": {"layers.0.mlp.experts": 2, "q_proj": 5}, "target_modules": ["q_proj"]},
        {"rank_pattern": {"experts": 2, "q_proj": 2}, "target_modules": ["q_proj"]},
    ],
)
def test_engines_that_read_one_rank_and_one_scale_find_every_change_of_a_file(fields, tmp_path):
    model = adapted(BUILDS["olmoe"](), **fields)
    export_per_expert(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    assert {len(own) for key, own in tensors.items() if "lora_A" in key} == {config["r"]}

    def change(key):
        A, B = (tensors[f"base_model.model.{key}.lora_{factor}.weight"] for factor in "AB")
        return config["lora_alpha"] / config["r"] * B @ A

    for index, block in enumerate(model.get_base_model().model.layers):
        bank, linear = block.mlp.experts.experts["default"], block.self_attn.q_proj.experts["default"]
        for expert in range(bank.num_experts):
            place = f"model.layers.{index}.mlp.experts.{expert}"
            torch.testing.assert_close(change(f"{place}.down_proj"), bank.delta("down", expert).T)
            both = torch.cat([change(f"{place}.gate_proj"), change(f"{place}.up_proj")])
            torch.testing.assert_close(both, bank.delta("gate_up", expert).T)
        own = linear.scaling * linear.B[0].T @ linear.A[0]
        torch.testing.assert_close(change(f"model.layers.{index}.self_attn.q_proj"), own)


def test_names_of_projections_are_the_engines(tmp_path):
    export_per_expert(adapted(BUILDS["olmoe"]()), tmp_path, projections=("w1", "w3", "w2"))
    names = {key.split(".")[-3] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {"w1", "w2", "w3"}
    with pytest.raises(ValueError, match="three names"):
        export_per_expert(adapted(BUILDS["olmoe"]()), tmp_path, projections=("w1", "w2"))


def test_other_adapters_and_files_are_refused(tmp_path):
    other = get_peft_model(tiny_olmoe(), LoraMoeConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no adapter of ExpertLoraConfig"):
        export_expert_lora(other, tmp_path)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="nothing to import"):
        import_expert_lora(tiny_olmoe(), tmp_path / "other")


def test_ranks_that_differ_between_modules_are_imported_and_come_back(tmp_path):
    ranks = {"layers.1.mlp.experts": 5, "q_proj": 2}
    config = ExpertLoraConfig(r=3, rank_pattern=ranks, target_modules=["q_proj", "v_proj"])
    own = get_peft_model(tiny_olmoe().double(), config).eval()
    randomize(own)
    export_expert_lora(own, tmp_path)
    again = import_expert_lora(tiny_olmoe().double(), tmp_path).eval()
    close(again(**BATCH).logits, own(**BATCH).logits)
    assert {p.shape for p in adapter_parameters(again).values()} == {p.shape for p in adapter_parameters(own).values()}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rank_pattern": {"gate_up_proj": 5}}, r"ranks \d and \d on the matrices.*accelerate_expert_lora"),
        ({"alpha_pattern": {"gate_up_proj": 5.5}}, "several sizes.*accelerate_expert_lora"),
    ],
)
def test_ranks_or_scales_that_differ_within_a_module_are_refused_before_anything_changes(overrides, message, tmp_path):
    stock_lora(**overrides).save_pretrained(tmp_path)
    base = tiny_olmoe().double()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        import_expert_lora(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == before


def test_a_file_of_another_model_leaves_the_model_as_it_was(tmp_path):
    stock_lora().save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key.replace("layers.1", "layers.7"): own for key, own in tensors.items()}, weights)
    base = tiny_olmoe().double()
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"were found|other places"):
        import_expert_lora(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == before


def test_a_file_of_other_experts_over_a_taken_name_is_refused(tmp_path):
    def chosen(ids):
        return get_peft_model(tiny_olmoe(), ExpertLoraConfig(r=2, experts={"0": ids}))

    chosen([1, 3]).save_pretrained(tmp_path)
    model = chosen([0, 2])
    before = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    with pytest.raises(ValueError, match="experts"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())
