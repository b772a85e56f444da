"""The adapter's flags are made from the configurations: types, help, and mappings as JSON or YAML."""

from __future__ import annotations

import dataclasses

import flags
import pytest
import sft
from common import moe_config

from moe_peft.methods import METHODS


def parse(*arguments):
    settings = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false", "--model_name_or_path", "none"]
    return sft.make_parser().parse_args_and_config([*settings, *arguments])[-1]


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--moe_r", "3"], "moe_r", 3),
        (["--moe_lora_alpha", "0.5"], "moe_lora_alpha", 0.5),
        (["--moe_use_rslora", "true"], "moe_use_rslora", True),
        (["--moe_target_modules", "q_proj", "v_proj"], "moe_target_modules", ["q_proj", "v_proj"]),
        (["--moe_layers_to_transform", "0", "1"], "moe_layers_to_transform", [0, 1]),
        (["--moe_router", "dense"], "moe_router", "dense"),
        (["--moe_losses", '{"z_loss": 0.1}'], "moe_losses", '{"z_loss": 0.1}'),
        ([], "moe_r", None),
    ],
)
def test_flags_have_the_types_of_their_fields(arguments, name, value):
    assert getattr(parse(*arguments), name) == value


def test_mappings_reach_the_configuration_from_a_command_line_and_from_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("moe_method: routed\nmoe_losses: {importance: 0.2}\n")
    from_yaml = moe_config(parse("--config", str(path)))
    from_flags = moe_config(parse("--moe_method", "routed", "--moe_losses", '{"importance": 0.2}'))
    assert from_yaml.losses == from_flags.losses == {"importance": 0.2}
    assert moe_config(parse("--config", str(path), "--moe_losses", '{"importance": 0.3}')).losses["importance"] == 0.3


@pytest.mark.parametrize("value", ["z_loss", "[1]", '{"z_loss": }', "0.1", "{'z_loss': 0.1}", "[" * 100_000])
def test_what_is_no_mapping_is_refused_with_an_example(value):
    with pytest.raises(ValueError, match=r"--moe_losses .* is no mapping in JSON. Write it in quotes") as error:
        moe_config(flags.MoeArguments(moe_method="routed", moe_losses=value))
    assert len(str(error.value)) < 500


def test_help_says_whose_a_flag_is_and_each_methods_default():
    texts = {own.name: own.metadata["help"] for own in dataclasses.fields(flags.MoeArguments)}
    assert "Methods: perft." in texts["moe_variant"]
    assert "Methods" not in texts["moe_target_modules"]
    for method in METHODS:
        assert method in texts["moe_num_experts"] or "num_experts" not in METHODS[method].__dataclass_fields__
    assert all(texts.values())


def test_help_says_the_range_of_numbers_in_the_words_of_their_refusals():
    texts = {own.name: own.metadata["help"] for own in dataclasses.fields(flags.MoeArguments)}
    for name, words in {
        "moe_r": "Must be a rank of at least 1 and at most 65536.",
        "moe_num_experts": "Must be at least 1 and at most 1048576.",
        "moe_top_k": "Must be between 1 and num_experts.",
        "moe_lora_dropout": "Must be a number from 0 up to, but not including, 1.",
        "moe_router_aux_loss_coef": "Must be zero or a positive number",
        "moe_capacity_factor": "Must be a positive number or None",
    }.items():
        assert words in texts[name], texts[name]
    fields = [own.name for own in dataclasses.fields(METHODS["routed"]) if own.name not in flags.WITHOUT_FLAG]
    numbers = [name for name in fields if set(flags.kinds_of(name, "routed")) <= {int, float}]
    assert len(numbers) > 10
    assert [name for name in numbers if "Must be" not in texts[f"moe_{name}"]] == []
    assert "Must be" not in texts["moe_target_modules"]


def test_the_parser_shows_its_help(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--moe_router_aux_loss_coef" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["router_args", "experts_args"])
def test_options_of_parts_reach_the_configuration_which_knows_them(name, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"moe_method: routed\nmoe_{name}: {{unheard_of: 0.4}}\n")
    for arguments in (["--config", str(path)], ["--moe_method", "routed", f"--moe_{name}", '{"unheard_of": 0.4}']):
        with pytest.raises(ValueError, match=rf"{name}: 'unheard_of' is no option"):
            moe_config(parse(*arguments))


def test_sizes_by_layer_reach_the_configuration():
    config = moe_config(parse("--moe_method", "routed", "--moe_per_layer", '{"r": [2, 4]}'))
    assert config.per_layer == {"r": [2, 4]}
