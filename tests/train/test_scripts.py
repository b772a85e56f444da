"""What all scripts refuse, before a model is loaded, and how their flags and YAML files go together."""

from __future__ import annotations

import importlib

import pytest
from trl import ScriptArguments

from moe_peft import MoePeftWarning
from tests.slices import diagonal, sliced
from tests.tiny import tiny_mixtral
from tests.train.tiny_run import make_base, make_data, make_tokenizer, run_here, words, write_run

SCRIPTS = ("sft", "dpo", "grpo", "rloo", "reward", "kto")
GRPO = {"reward_funcs": ["get_soft_overlong_punishment"], "num_generations": 2}

# The names of the columns of this file are none that a trainer reads.
OTHER = "other.csv"


def write(folder, script, **values):
    """A run whose model has no weights: what is refused is refused before they are read."""
    base = make_base(folder / "base")
    (folder / "base/model.safetensors").unlink()
    data = make_data(folder / "data", [{"text": words(i, 3)} for i in range(4)])
    values = {**(GRPO if script in ("grpo", "rloo") else {}), **values}
    return write_run(folder, **{"model_name_or_path": base, "dataset_name": data, **values})


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_overrides_the_yaml_file_which_overrides_the_default(script, tmp_path):
    run = write(tmp_path, script, learning_rate=0.5, moe_r=7, weight_decay=0.25)
    parser = importlib.import_module(script).make_parser()
    flags = ["--config", str(run), "--learning_rate", "0.125", "--moe_r", "9"]
    _, training, _, _, moe = parser.parse_args_and_config(flags)
    assert (training.learning_rate, training.weight_decay, moe.moe_r) == (0.125, 0.25, 9)
    assert moe.moe_lora_alpha is None and training.adam_beta1 == 0.9


REFUSED = {
    "unknown key": (
        {"moe_num_expert": 3},
        (),
        r"run\.yaml: the key 'moe_num_expert' means nothing .* Did you mean moe_num_experts",
    ),
    "unknown flag": ({}, ("--moe_number", "3"), "--moe_number is no flag of"),
    "flag of another method": (
        {},
        ("--moe_method", "sira", "--moe_expert_groups", "0", "1"),
        "no meaning for --moe_m",
    ),
    "impossible value": ({"moe_top_k": 9}, (), "top_k=9 must be between 1 and num_experts=4"),
    "flag of plain LoRA": ({"lora_r": 8}, (), r"\['lora_r'\] describe plain LoRA"),
    "place that is not there": ({"moe_target_modules": ["down_prj"]}, (), r"Nearest names: \['down_proj'"),
    "no model": ({"model_name_or_path": None}, (), "--model_name_or_path is missing"),
    "no data": ({"dataset_name": None}, (), "Give either `datasets`"),
    "no such split": ({}, ("--dataset_train_split", "trian"), r"trian: the data has the splits \['test', 'train'\]"),
    "no split to evaluate on": (
        {"eval_strategy": "steps", "eval_steps": 1, "dataset_test_split": "dev"},
        (),
        "dev: th",
    ),
    "no such model": (
        {"model_name_or_path": "./nowhere"},
        (),
        r"--model_name_or_path \./nowhere: there is no such folder",
    ),
    "no model in the folder": ({"model_name_or_path": "."}, (), r"--model_name_or_path \. holds no config\.json"),
    "no such data": (
        {"dataset_name": "./nowhere.jsonl"},
        (),
        r"--dataset_name \./nowhere\.jsonl: there is no such file",
    ),
    "other columns": ({}, ("--dataset_name", OTHER), "has the columns other, but .* needs .*; the first row is"),
    "no checkpoint": ({"resume_from_checkpoint": True}, (), "no complete checkpoint"),
}
REFUSED_BY = [(script, case) for script in SCRIPTS for case in REFUSED]


@pytest.mark.parametrize(("script", "case"), sliced(REFUSED_BY, diagonal(REFUSED_BY, 0, whole=("sft",), every=3)))
def test_what_cannot_work_is_refused_before_a_model_is_loaded(script, case, tmp_path, monkeypatch):
    values, flags, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / OTHER).write_text("other\n1\n2\n")
    with pytest.raises(ValueError, match=message):
        run_here(script, write(tmp_path, script, **values), *flags)


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "sft"])
def test_the_report_belongs_to_supervised_fine_tuning(script, tmp_path):
    with pytest.raises(ValueError, match=r"the key 'moe_report' means nothing"):
        run_here(script, write(tmp_path, script, moe_report=True))


def moe_run(folder, script, **values):
    tiny_mixtral().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    data = make_data(folder / "data", [{"text": words(i, 5)} for i in range(8)])
    fields = {"moe_target_modules": ["q_proj", "v_proj"], "model_name_or_path": str(folder / "base"), **values}
    return write_run(folder, dataset_name=data, **fields)


def test_the_balance_loss_of_the_backbone_is_off_with_coefficient_0_and_warned_of_where_left_out(tmp_path):
    off = run_here("sft", moe_run(tmp_path / "off", "sft", router_aux_loss_coef=0.0))
    assert not off.aux_loss_enabled and "aux_loss" not in off.state.log_history[0]
    assert "moe/load_balancing" in off.state.log_history[0]
    with pytest.warns(MoePeftWarning, match=r"router_aux_loss_coef=0\.001.*Write router_aux_loss_coef: 0\.0"):
        on = run_here("sft", moe_run(tmp_path / "on", "sft"))
    assert "aux_loss" in on.state.log_history[0]


@pytest.mark.parametrize("script", ["sft", "reward"])
def test_routers_and_up_matrices_learn_at_rates_of_their_own(script, tmp_path):
    data = make_data(tmp_path / "data", [{"text": words(i, 5)} for i in range(4)])
    if script == "reward":
        rows = [{"chosen": words(20 + i, 5), "rejected": words(40 + i, 4)} for i in range(4)]
        data = make_data(tmp_path / "pairs", rows)
    run = write_run(tmp_path, model_name_or_path=make_base(tmp_path / "base"), dataset_name=data)
    trainer = run_here(script, run, "--moe_router_lr", "0.125", "--moe_lora_plus_ratio", "16")
    groups = trainer.optimizer.param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    names = {name: rates[id(p)] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {rate for name, rate in names.items() if "_router." in name} == {0.125}
    assert {rate for name, rate in names.items() if name.endswith(".B")} == {0.16}
    assert {rate for name, rate in names.items() if name.endswith(".A")} == {0.01}


def test_a_mixture_of_data_sets_is_read_from_the_yaml_file(tmp_path):
    import data as loading

    data = make_data(tmp_path / "data", [{"text": words(i, 3)} for i in range(6)])
    mixture = [{"path": "json", "data_files": f"{data}/{split}.jsonl"} for split in ("train", "test")]
    run = write_run(tmp_path, dataset_name=None, datasets=mixture, test_split_size=0.5)
    script_args, _, _, dataset_args, _ = (
        importlib.import_module("sft").make_parser().parse_args_and_config(["--config", str(run)])
    )
    train, test = loading.splits(loading.load_data(script_args, dataset_args), ScriptArguments(), evaluates=True)
    assert (len(train), len(test)) == (3, 3)


def test_packing_and_groups_and_a_column_of_groups_that_is_not_there_are_refused(tmp_path):
    groups = {"moe_method": "loramoe", "moe_expert_groups": [0, 0, 1, 1]}
    run = write(tmp_path, "sft", **groups)
    with pytest.raises(ValueError, match=r"--packing true joins samples .*moe_expert_groups.*--packing false"):
        run_here("sft", run, "--packing", "true")
    with pytest.raises(ValueError, match=r"has the columns text, but moe_expert_groups needs 'task_type'"):
        run_here("sft", run)


def test_a_router_that_reads_groups_is_refused_by_its_name_before_the_model_is_loaded(tmp_path):
    run = write(tmp_path, "sft", moe_method="routed", moe_scorer="task_table", moe_group_column="topic")
    with pytest.raises(ValueError, match=r"--packing true joins .* but TaskTable needs .*another part than TaskTable"):
        run_here("sft", run, "--packing", "true")
    with pytest.raises(ValueError, match=r"has the columns text, but TaskTable needs 'topic'"):
        run_here("sft", run)
