"""Parameters are made of a checkpoint's tensors and go back into them, whatever names and forms the files have."""

from __future__ import annotations

import pytest
import torch

from moe_peft.backbone.without_weights import meta_model
from moe_peft.tools.checkpoint_layout import CheckpointLayout
from tests.backbones.models import tiny_model
from tests.tiny import tiny_llama, tiny_mixtral
from tests.tools.exported import tensors

BUILDS = {
    "mixtral": tiny_mixtral,
    "qwen3_moe": lambda: tiny_model("qwen3_moe"),
    "deepseek_v2": lambda: tiny_model("deepseek_v2"),
    "gpt_oss": lambda: tiny_model("gpt_oss"),
}


@pytest.mark.parametrize("name", BUILDS)
def test_every_parameter_is_read_and_written_back_to_the_last_bit(name, tmp_path):
    model = BUILDS[name]()
    model.save_pretrained(tmp_path)
    stored, parameters = tensors(tmp_path), dict(model.named_parameters())
    layout = CheckpointLayout(meta_model(model.config), stored)
    written: dict[str, torch.Tensor] = {}
    for group in {own.name: own for own in layout.groups.values()}.values():
        read = layout.read(group, stored.__getitem__)
        assert set(read) == set(group.parameters)
        for key, own in read.items():
            assert torch.equal(own, parameters.get(key, own))
        written |= layout.written(group, read)
    assert set(parameters) <= layout.groups.keys()
    assert written.keys() == stored.keys() and all(torch.equal(written[key], own) for key, own in stored.items())


def test_names_without_the_prefix_of_the_backbone_are_found():
    model = tiny_llama()
    names = [name.removeprefix("model.") for name in model.state_dict()]
    layout = CheckpointLayout(meta_model(model.config), names)
    group = layout.groups["model.layers.0.mlp.up_proj.weight"]
    assert group.sources == [("layers.0.mlp.up_proj.weight", None)]


def test_a_form_that_is_not_written_back_is_refused(tmp_path):
    model = tiny_mixtral()
    model.save_pretrained(tmp_path)
    stored = tensors(tmp_path)
    layout = CheckpointLayout(meta_model(model.config), stored)
    group = layout.groups["model.layers.0.mlp.experts.down_proj"]
    read = layout.read(group, stored.__getitem__)
    group.sources[0] = ("model.layers.0.another.name", group.sources[0][1])
    with pytest.raises(ValueError, match="merge_and_unload"):
        layout.written(group, read)
