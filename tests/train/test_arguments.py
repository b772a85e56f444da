"""The command line of the scripts: files by name and their order, settings of a method, and messages in one line."""

from __future__ import annotations

import pytest
import sft

CPU = ("--use_cpu", "--output_dir", "out", "--model_name_or_path", "none")


def parse(*words):
    return sft.make_parser().parse_args_and_config([*CPU, *words])


def write(folder, name, text):
    (folder / name).write_text(text)
    return str(folder / name)


def test_use_cpu_alone_suffices_on_a_cpu():
    _, training, *_ = parse()
    assert training.use_cpu and not training.bf16
    _, training, *_ = parse("--bf16", "true")
    assert training.bf16


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
@pytest.mark.parametrize("value", [True, False])
def test_both_names_of_checkpointing_are_read_from_flags_and_files(name, value, tmp_path, recwarn):
    run = write(tmp_path, "run.yaml", f"{name}: {value}\n")
    for words in ((f"--{name}", str(value)), ("--config", run)):
        _, training, *_ = parse(*words)
        assert training.gradient_checkpointing == value
        assert getattr(training, "activation_checkpointing", value) == value
    assert not [entry for entry in recwarn if "will be removed" in str(entry.message)] or name.startswith("gradient")


def test_a_run_and_a_method_are_found_by_name():
    *_, moe = parse("--config", "olmoe_1b_7b_mov", "--bf16", "false")
    assert (moe.moe_method, moe.moe_num_experts) == ("mov", 10)
    *_, moe = parse("--moe_config", "sira")
    assert (moe.moe_method, moe.moe_capacity_factor) == ("sira", 1.25)


@pytest.mark.parametrize(
    "words", [("--moe_preset", "hydralora"), ("--moe-preset=HydraLoRA",), ("--moe_config", "hydralora")]
)
def test_a_preset_is_taken_by_the_name_of_its_method(words):
    *_, moe = parse(*words)
    assert (moe.moe_method, moe.moe_experts, moe.moe_num_experts) == ("routed", "shared_down", 3)
    with pytest.raises(ValueError, match="--moe_config sira and --moe_preset mov are the same flag"):
        parse("--moe_config", "sira", "--moe_preset", "mov")
    with pytest.raises(ValueError, match=r"--moe_preset hydralore: there is no such file.*Nearest names: .*hydralora"):
        parse("--moe_preset", "hydralore")


def test_a_flag_counts_before_the_method_file_and_that_before_the_run(tmp_path):
    run = write(tmp_path, "run.yaml", "moe_method: sira\nmoe_r: 1\nmoe_top_k: 1\nmoe_num_experts: 5\nseed: 9\n")
    method = write(tmp_path, "method.yaml", "moe_method: sira\nmoe_r: 2\nmoe_top_k: 2\n")
    _, training, *_, moe = parse("--config", run, f"--moe_config={method}", "--moe_r", "3")
    assert (moe.moe_r, moe.moe_top_k, moe.moe_num_experts, training.seed) == (3, 2, 5, 9)


def test_a_method_file_of_another_method_takes_the_place_of_the_runs_adapter(tmp_path, capsys):
    run = write(tmp_path, "run.yaml", "moe_method: loramoe\nmoe_expert_groups: [0, 1]\nmoe_router_lr: 0.5\nseed: 9\n")
    _, training, *_, moe = parse("--config", run, "--moe_config", "methods/sira")
    assert (moe.moe_method, moe.moe_expert_groups, moe.moe_router_lr, training.seed) == ("sira", None, 0.5, 9)
    assert "whose moe_expert_groups are left out" in capsys.readouterr().out


def test_a_key_that_the_method_lacks_is_refused_with_its_file(tmp_path):
    run = write(tmp_path, "shared.yaml", "moe_method: sira\nmoe_variant: R\n")
    with pytest.raises(
        ValueError, match=r"shared\.yaml: moe_variant has no meaning for moe_method sira, but for perft"
    ):
        parse("--config", run)
    *_, moe = parse("--config", run, "--moe_method", "perft")
    assert moe.moe_variant == "R"


WRONG = {
    "a missing file": (("--config", "nowhere.yaml"), "--config nowhere.yaml: there is no such file"),
    "no file": (("--config",), "--config needs the path or the name of a YAML file"),
    "a folder": (("--config", "."), "--config . is a folder"),
    "an unknown flag": (
        ("--moe_num_expert", "3"),
        "--moe_num_expert is no flag of .* Did you mean --moe_num_experts?",
    ),
    "an abbreviation": (("--moe_meth", "sira"), "--moe_meth is no flag of .* Did you mean --moe_method?"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_means_nothing_is_one_line_with_the_nearest_name(case):
    words, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        parse(*words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1\n", "just words\n", ""])
def test_a_file_that_is_no_mapping_is_refused_by_name(text, tmp_path):
    with pytest.raises(ValueError, match=r"run\.yaml (is no YAML|must hold a mapping)"):
        parse("--config", write(tmp_path, "run.yaml", text))


@pytest.mark.parametrize("words", [("--moe_r", "four"), ("--moe_method", "lroa"), ("--learning_rate",)])
def test_a_value_of_another_kind_is_one_line_and_no_usage(words, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*words)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.count("\n") == 1 and words[0] in printed


def test_what_was_given_is_known_by_name(tmp_path):
    run = write(tmp_path, "run.yaml", "seed: 9\n")
    *_, moe = parse("--config", run, "--learning-rate", "0.1", "--moe_r=2")
    assert {"seed", "learning_rate", "moe_r", "use_cpu"} <= moe.given and "moe_num_experts" not in moe.given
