"""An adapter is loaded with its own numbers and the shapes of its base alone."""

from __future__ import annotations

import pytest
import torch

from moe_peft import EsftConfig, MoloraConfig
from moe_peft.tools import load_without_base
from tests.contract.cases import adapter_parameters, tiny_olmoe
from tests.tiny import tiny_llama
from tests.tools.exported import checkpoint, trained


@pytest.mark.parametrize(
    ("build", "config"),
    [
        (tiny_olmoe, EsftConfig(experts={"1": [0, 2]}, train_router=True)),
        (tiny_llama, MoloraConfig(num_experts=2, modules_to_save=["lm_head"], trainable_token_indices=[3])),
    ],
)
def test_the_adapter_is_there_and_the_base_is_not(build, config, tmp_path):
    base = checkpoint(build(), tmp_path / "base")
    expected = adapter_parameters(trained(base, tmp_path / "adapter", config))
    model = load_without_base(tmp_path / "adapter")
    found = adapter_parameters(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], own) for key, own in expected.items())
    assert not any(own.is_meta for name, own in model.named_parameters() if "default" in name)
    assert all(own.is_meta for name, own in model.named_parameters() if "default" not in name)


def test_a_base_that_is_not_known_or_does_not_fit_is_refused(tmp_path):
    base = checkpoint(tiny_llama(), tmp_path / "base")
    trained(base, tmp_path / "adapter", MoloraConfig(num_experts=1))
    with pytest.raises(ValueError, match="no configuration that can be read"):
        load_without_base(tmp_path / "adapter", tmp_path / "nowhere")
    other = checkpoint(tiny_llama(hidden_size=64), tmp_path / "other")
    with pytest.raises(ValueError, match="shape"):
        load_without_base(tmp_path / "adapter", other)
    with pytest.raises(ValueError, match=r"no folder|adapter_config"):
        load_without_base(tmp_path / "nowhere")
