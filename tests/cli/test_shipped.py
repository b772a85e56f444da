"""Configurations are found by path and by name; what is wrong with a name is said."""

from __future__ import annotations

import pytest
import yaml

from moe_peft.cli.shipped import KINDS, _plain, find_config, names_of, shipped


@pytest.mark.parametrize("kind", KINDS)
def test_every_configuration_is_found_by_its_name_in_each_spelling(kind):
    assert names_of(kind)
    for name, path in names_of(kind).items():
        for spelling in (f"{kind}/{name}", f"{kind}/{name}.yaml", f"configs/{kind}/{name}.yaml", str(path)):
            assert find_config(spelling, "--config").resolve() == path.resolve()
        assert find_config(name, "--config", (kind,)) == path


@pytest.mark.parametrize("spelling", ["hydralora", "HydraLoRA", "hydra-lora", "routed_hydralora", "methods/hydralora"])
def test_a_method_is_found_as_people_write_its_name(spelling):
    assert find_config(spelling, "--moe_preset", ("methods",)) == names_of("methods")["routed_hydralora"]


# Methods of the literature as people write them, and the preset that each is. X-LoRA and Lily are of stock peft, and
# MoLEx routes whole layers, which no adapter of a layer does.
LITERATURE = {
    "AdaMix": "adamix",
    "AdaMoE": "adamoe",
    "AdaMoLE": "adamole",
    "Arrow": "arrow",
    "Autonomy-of-Experts": "autonomy_of_experts",
    "CoMoL": "comol",
    "CompeteSMoE": "competesmoe",
    "DeepSeek": "deepseek",
    "DynMoLE": "dynmole",
    "FlyLoRA": "flylora",
    "GOAT": "goat",
    "GRIN": "grin",
    "HMoRA": "hmora",
    "HydraLoRA": "hydralora",
    "LD-MoLE": "ld_mole",
    "LoRA-Mixer": "lora_mixer",
    "MixLoRA": "mixlora",
    "MixLoRA-FFN": "mixlora_ffn",
    "MoA": "moa",
    "MoDULA": "modula",
    "MOELoRA": "moelora",
    "contrastive MoELoRA": "contrastive_moelora",
    "MoLA": "mola",
    "MoR": "mor",
    "MoRAL": "moral",
    "MoSLD": "mosld",
    "Nexus": "nexus",
    "Poly": "poly",
    "ReMoE": "remoe",
    "SkillNet": "skillnet",
    "SMEAR": "smear",
    "SMoRA": "smora",
    "StableMoE": "stablemoe",
    "Switch": "switch",
    "Switch-LoRA": "switch_lora",
    "THOR": "thor",
    "TT-LoRA MoE": "tt_lora_moe",
    "X-MoE": "x_moe",
}


@pytest.mark.parametrize("name", LITERATURE)
def test_the_methods_of_the_literature_are_presets_under_their_names(name):
    wanted = names_of("methods")[f"routed_{LITERATURE[name]}"]
    assert find_config(name, "--moe_preset", ("methods",)) == wanted


TWO_BEST = {"router": "top_k", "top_k": 2, "norm_topk_prob": True}
# What the papers fix of a method, as their texts and the authors' code have it; other sizes are examples.
FIXED = {
    "adamix": {"router": "random", "experts": "shared_down"},
    "adamoe": {"router": "null_top_k", "losses": {"null_load_balancing": 0.01}},
    "adamole": {"router": "threshold"},
    "autonomy_of_experts": {**TWO_BEST, "scorer": "activation_norm"},
    "comol": {"scorer": "low_space", "experts": "latent_core"},
    "deepseek": {"router": "bias_balanced", "gate": "sigmoid", "norm_topk_prob": True, "experts_args": {"shared": 1}},
    "dynmole": {"router": "entropy_top_k", "router_args": {"broadcast": "always", "entropy_index": 1.1, "p": 0.75}},
    "flylora": {"router": "bias_balanced", "scorer": "activation_abs", "experts": "sparse_down", "r": 1},
    "goat": {**TWO_BEST, "experts": "goat"},
    "grin": {"router": "sparsemixer", "top_k": 2},
    "hmora": {
        "scorer": "hybrid",
        "losses": {"certainty_balance": {"weight": 0.001, "balance": 0.98, "certainty": 0.5}},
    },
    "hydralora": {"router": "dense", "experts": "shared_down", "num_experts": 3, "router_aux_loss_coef": 0.0},
    "ld_mole": {"router": "sparsegen"},
    "lora_mixer": {"router": "top_k", "top_k": 3, "losses": {"entropy_balance": 0.01}},
    "mixlora": {**TWO_BEST, "router_scope": "block", "num_experts": 8, "router_aux_loss_coef": 0.01},
    "mixlora_ffn": {**TWO_BEST, "wraps": "block", "experts": "ffn_lora", "router_aux_loss_coef": 0.01},
    "moa": {"router": "threshold", "gate": "sigmoid"},
    "modula": {**TWO_BEST, "experts_args": {"shared": 1}},
    "moelora": {"router": "dense", "scorer": "task_table"},
    "mola": {**TWO_BEST, "per_layer": {"num_experts": [2, 4, 6, 8]}, "r": 8, "router_aux_loss_coef": 0.01},
    "mor": {"scorer": "mixture"},
    "mosld": {**TWO_BEST, "experts": "shared_down", "experts_args": {"down_dropout": 0.1}},
    "poly": {"scorer": "task_table", "gate": "relaxed_bernoulli"},
    "remoe": {"router": "positive", "gate": "relu", "losses": {"active_l1": {"weight": 1e-8, "active": 1}}},
    "skillnet": {"scorer": "task_table"},
    "smora": {"router": "bias_balanced", "num_experts": 64, "top_k": 8, "r": 1, "router_aux_loss_coef": 0.0},
    "switch": {"router": "capacity", "top_k": 1, "capacity_factor": 1.25, "router_jitter_noise": 0.01},
    "top_p": {"router": "top_p", "router_args": {"p": 0.4}, "losses": {"token_entropy": 1e-4}},
    "tt_lora_moe": {"router": "top_k", "top_k": 1},
    "x_moe": {"scorer": "cosine", "router_args": {"width": 16}},
}


@pytest.mark.parametrize("name", FIXED)
def test_a_preset_has_the_values_that_its_paper_fixes(name):
    values = yaml.safe_load(names_of("methods")[f"routed_{name}"].read_text())
    found = {field: values.get(f"moe_{field}") for field in FIXED[name]}
    assert found == FIXED[name]


def test_no_two_methods_have_the_same_name_in_any_spelling():
    found = [_plain(name.removeprefix("routed_")) for name in names_of("methods")]
    assert len(set(found)) == len(found)


def test_a_file_counts_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sira").write_text("moe_method: sira\n")
    assert find_config("sira", "--moe_config").resolve() == tmp_path / "sira"


def test_a_folder_and_an_unknown_name_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"--config .* is a folder. Name a YAML file"):
        find_config(str(tmp_path), "--config")
    with pytest.raises(ValueError, match=r"--config olmoe_1b_7b_mof: there is no such file.*olmoe_1b_7b_mov"):
        find_config("olmoe_1b_7b_mof", "--config")


def test_the_folders_are_those_of_the_package():
    assert (shipped("train") / "sft.py").is_file() and (shipped("configs") / "runs").is_dir()
    with pytest.raises(FileNotFoundError, match="Install peft-moe again"):
        shipped("nowhere")
