"""Names of other libraries that are not public and that the package stands on: each says what to mend when it goes."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import version

import pytest
import torch
from torch import nn

from tests.tiny import tiny_llama, tiny_mixtral

# Module, dotted name in it, parameters that are passed by name, and what depends on it.
NAMES = [
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._create_and_replace",
        ["current_key"],
        "tuner.RoutedTuner injects through it",
    ),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._prepare_model",
        ["peft_config", "model"],
        "all checks of places run in it",
    ),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._prepare_adapter_config",
        ["peft_config"],
        "targets stay unresolved in it",
    ),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._replace_module",
        ["child", "new_module"],
        "layers are put in place by it",
    ),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner.inject_adapter",
        ["adapter_name"],
        "a refused adapter is undone around it",
    ),
    ("peft.tuners.tuners_utils", "BaseTuner._check_merge_allowed", [], "merging is refused before it changes weights"),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._unload_and_optionally_merge",
        ["merge"],
        "trackers are detached after it",
    ),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._get_adapter_state_dict",
        ["state_dict"],
        "tuner/saving.py selects tensors",
    ),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._remove_adapter_name_from_key",
        ["key"],
        "files get names without wrappers",
    ),
    (
        "peft.tuners.tuners_utils",
        "BaseTuner._remap_adapter_state_dict_for_load",
        ["state_dict"],
        "state dicts are checked",
    ),
    ("peft.tuners.tuners_utils", "BaseTunerLayer.set_adapter", ["adapter_names"], "layers refreeze what never trains"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer._move_adapter_to_device_of_base_layer", ["adapter_name"], "devices"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer._get_base_layer_device_and_dtype", [], "dtypes of experts follow it"),
    ("peft.tuners.tuners_utils", "check_target_module_exists", [], "places are matched as peft matches them"),
    ("peft.utils.quantization_utils", "resolve_quantization_backend", [], "quantized linears are read through it"),
    ("peft.utils.quantization_utils", "get_quantization_kwargs", [], "quantized linears are read through it"),
    ("peft.utils.other", "AuxiliaryTrainingWrapper", [], "tuner/tensors.py finds modules that are saved whole"),
    ("peft.utils.other", "ModulesToSaveWrapper", [], "tuner/tensors.py finds modules that are saved whole"),
    ("peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING", [], "registration enters adapter types"),
    ("peft.mapping", "PEFT_TYPE_TO_TUNER_MAPPING", [], "registration enters adapter types"),
    ("peft.mapping", "PEFT_TYPE_TO_PREFIX_MAPPING", [], "registration enters adapter types"),
    ("peft.utils", "register_peft_method", ["name", "config_cls", "model_cls", "prefix"], "registration calls it"),
    ("peft.tuners.lora.layer", "ParamWrapper", [], "stock adapters on experts are recognised by it"),
    ("transformers.utils.output_capturing", "maybe_install_capturing_hooks", [], "router logits of wrapped blocks"),
    (
        "transformers.integrations.peft",
        "PeftAdapterMixin.load_adapter",
        ["adapter_name"],
        "tuner/entries.py frames it",
    ),
    ("torch.distributed.tensor", "DTensor", [], "sharded tensors are recognised by it"),
    ("torch._C", "_current_graph_task_id", None, "forward/recomputation.py knows a backward by it"),
    ("torch._C", "_current_autograd_node", None, "forward/recomputation.py knows what a backward repeats by it"),
]
SINCE_0_21 = ("_get_adapter_state_dict", "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load")
FRAMED = {
    ("peft", "PeftModel.from_pretrained"): ["model", "model_id", "adapter_name", "config", "key_mapping"],
    ("peft", "PeftModel.load_adapter"): ["model_id", "adapter_name", "key_mapping"],
    ("peft", "PeftModel.save_pretrained"): [
        "save_directory",
        "selected_adapters",
        "is_main_process",
        "safe_serialization",
    ],
    ("transformers.integrations.peft", "PeftAdapterMixin.load_adapter"): [
        "peft_model_id",
        "adapter_name",
        "peft_config",
        "adapter_state_dict",
        "local_files_only",
        "adapter_kwargs",
        "load_config",
    ],
    ("peft", "PeftModel.set_adapter"): ["adapter_name"],
    ("transformers.integrations.peft", "PeftAdapterMixin.add_adapter"): ["adapter_config", "adapter_name"],
    ("transformers.integrations.peft", "PeftAdapterMixin.set_adapter"): [],
    ("transformers.integrations.peft", "PeftAdapterMixin.enable_adapters"): [],
    ("transformers.integrations.peft", "PeftAdapterMixin.disable_adapters"): [],
    ("transformers.integrations.peft", "PeftAdapterMixin.delete_adapter"): [],
    ("transformers", "PreTrainedModel.save_pretrained"): ["save_directory", "is_main_process"],
}


def found(module: str, name: str) -> object:
    value: object = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


@pytest.mark.parametrize(("module", "name", "parameters", "why"), NAMES)
def test_a_name_is_where_it_was(module, name, parameters, why):
    if name.endswith(SINCE_0_21) and version("peft").startswith("0.20."):
        pytest.skip("peft has it since 0.21; before, tuner/entries.py checks alone")
    value = found(module, name)
    assert value is not None, f"{module}.{name} is gone, on which the package stands: {why}."
    if parameters:
        missing = set(parameters) - set(inspect.signature(value).parameters)
        assert not missing, f"{module}.{name} has no parameter {sorted(missing)}: {why}."


@pytest.mark.parametrize(("module", "name"), FRAMED)
def test_a_method_that_reads_writes_or_switches_adapters_is_framed_and_has_its_parameters(module, name):
    value = found(module, name)
    missing = set(FRAMED[module, name]) - set(inspect.signature(value).parameters)
    assert not missing, f"{name} has no parameter {sorted(missing)}: mend its frame in tuner/entries.py."
    function = getattr(value, "__func__", value)
    assert hasattr(function, "_moe_peft_original"), f"{name} is not framed: files would be loaded without checks."


def test_members_can_be_added_to_the_enum_of_adapter_types():
    from peft import PeftType

    for name in ("_member_names_", "_member_map_", "_value2member_map_"):
        assert hasattr(PeftType, name), f"PeftType has no {name}: mend tuner/registration.py."


def test_modules_keep_their_parts_under_the_names_that_are_read():
    module = nn.Linear(1, 1)
    for name in ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
        assert name in vars(module), (
            f"torch.nn.Module keeps {name} elsewhere: mend backbone/expert_tensors.py and layers."
        )
    everywhere = importlib.import_module("torch.nn.modules.module")
    assert hasattr(everywhere, "_global_forward_hooks"), "global hooks have moved: mend layers/shared_rows.py."


def test_wrappers_put_the_names_that_saving_strips():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    advice = "mend AROUND in tuner/tensors.py, or adapters are saved under names that no base model has"
    names = [name for name, _ in checkpoint_wrapper(nn.Linear(1, 1)).named_parameters()]
    # The wrapper hides its name here, and shows it to those who walk the modules.
    assert all("." not in name for name in names) or "_checkpoint_wrapped_module" in names[0], advice
    modules = dict(checkpoint_wrapper(nn.Linear(1, 1)).named_modules())
    assert "_checkpoint_wrapped_module" in modules, advice
    compiled = torch.compile(nn.Linear(1, 1), backend="eager")
    assert all(name.startswith("_orig_mod.") for name, _ in compiled.named_parameters()), advice


def test_a_model_of_transformers_says_whether_it_has_an_adapter():
    model = tiny_llama()
    assert model._hf_peft_config_loaded is False, (
        "transformers marks adapters elsewhere: mend tuner/tuner.py, entries.py."
    )
    assert hasattr(model, "_can_record_outputs"), "outputs are recorded elsewhere: mend tuner/router_outputs.py."


def test_fused_experts_have_the_attributes_of_the_interface():
    experts = tiny_mixtral().model.layers[0].mlp.experts
    for name in ("has_gate", "is_transposed", "is_concatenated", "num_experts", "gate_up_proj", "down_proj"):
        assert hasattr(experts, name), (
            f"fused experts have no {name}: mend backbone/structure.py, layers/fused_experts.py."
        )
    assert list(inspect.signature(type(experts).forward).parameters)[1:4] == [
        "hidden_states",
        "top_k_index",
        "top_k_weights",
    ], "experts are called in another way: mend backbone/experts_call.py."


def test_trainers_keep_their_metrics_and_their_callbacks_where_they_are_read():
    trl = pytest.importorskip("trl")
    from transformers import Trainer

    assert "_metrics" in inspect.getsource(trl.SFTTrainer), "TRL keeps its metrics elsewhere."
    assert "callback_handler" in inspect.getsource(Trainer.__init__), "attach finds callbacks elsewhere."
    from trl.trainer.utils import disable_dropout_in_model

    assert "nn.Dropout" in inspect.getsource(disable_dropout_in_model), "TRL switches dropout off in another way."
