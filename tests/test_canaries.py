"""Names of other libraries that are not public and that the package stands on: each says what to mend when it goes."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from importlib.metadata import version
from pathlib import Path

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
    *(
        (f"transformers.models.{name}.modeling_{name}", f"{cls}Model.{padder}", [], "forward/frames.py masks by it")
        for name, cls, padder in (
            ("longformer", "Longformer", "_pad_to_window_size"),
            ("big_bird", "BigBird", "_pad_to_block_size"),
            ("reformer", "Reformer", "_pad_to_mult_of_chunk_length"),
            ("canine", "Canine", "_downsample_attention_mask"),
        )
    ),
    ("torch.distributed.tensor", "DTensor", [], "sharded tensors are recognised by it"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer._get_available_adapters", [], "tuner/merging.py plans with it"),
    (
        "peft.tuners.trainable_tokens",
        "TrainableTokensLayer._check_overlapping_tokens",
        [],
        "tuner/merging.py asks it whether tokens of several adapters can be merged",
    ),
    ("peft.tuners.lora.layer", "ParamWrapper.get_delta_weight", ["adapter_name"], "layers/accelerated_lora.py"),
    ("transformers", "Trainer._finalize_training", [], "training_run.py ends a run that has no step left with it"),
    (
        "transformers.quantizers.quantizer_bnb_4bit",
        "Bnb4BitHfQuantizer._process_model_before_weight_loading",
        ["model", "device_map"],
        "quantization/loading.py packs experts around it",
    ),
    (
        "transformers.quantizers.quantizer_bnb_4bit",
        "Bnb4BitHfQuantizer._process_model_after_weight_loading",
        ["model"],
        "quantization/loading.py packs experts around it",
    ),
    (
        "transformers.hf_argparser",
        "HfArgumentParser._add_dataclass_arguments",
        ["dtype"],
        "train/arguments.py groups the help by it",
    ),
    ("accelerate.commands.launch", "_validate_launch_command", ["args"], "cli/launch.py fills in the defaults by it"),
    ("accelerate.utils.launch", "prepare_simple_launcher_cmd_env", ["args"], "cli/launch.py starts one process by it"),
    ("torch.autograd.graph", "_engine_run_backward", [], "forward/recomputation.py knows a backward's frame by it"),
    ("torch.autograd", "_get_sequence_nr", None, "forward/recomputation.py orders what a forward has recorded by it"),
    ("torch._C._functorch", "peek_interpreter_stack", None, "forward/objective.py and ops/project.py know vmap by it"),
    (
        "torch.autograd",
        "Variable._execution_engine.queue_callback",
        None,
        "forward/calls.py and objective.py hear the end of a backward by it",
    ),
    ("torch", "_assert_async", None, "forward/host_checks.py lets a device stop by it"),
    ("torch._C", "_current_graph_task_id", None, "forward/recomputation.py knows a backward by it"),
    ("torch._C", "_is_any_autocast_enabled", None, "ops/dtypes.py asks once for all devices by it"),
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
    assert hasattr(module, "_compiled_call_impl") and hasattr(module, "_backward_pre_hooks"), (
        "compiled calls or hooks of modules are kept elsewhere: mend layers/shared_rows.py and layers/expert_pass.py."
    )
    everywhere = importlib.import_module("torch.nn.modules.module")
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    ):
        assert hasattr(everywhere, name), f"{name}: global hooks have moved: mend layers/expert_pass.py."


def test_tensors_say_what_is_read_of_them():
    weight = nn.Parameter(torch.ones(2, 2))
    before = weight._version
    with torch.no_grad():
        weight.add_(1)
    assert weight._version > before, "changes of a parameter are counted elsewhere: mend forward/tracker.py."
    assert weight[0]._is_view() and not (weight * 1)._is_view(), "views are told in another way: mend ops/dense.py."
    assert weight.untyped_storage()._cdata == weight[0].untyped_storage()._cdata, (
        "storages have no number that is their own: mend tools/memory.py."
    )
    node = (weight * 2).grad_fn
    assert node._sequence_nr() < torch.autograd._get_sequence_nr(), (
        "nodes of the graph are not numbered in the order of the forward: mend forward/recomputation.py."
    )


def test_a_hooked_module_keeps_its_forward_where_it_is_looked_for():
    from accelerate.hooks import ModelHook, add_hook_to_module

    hooked = add_hook_to_module(nn.Linear(1, 1), ModelHook())
    assert "_old_forward" in vars(hooked), "accelerate keeps the forward elsewhere: mend layers/expert_pass.py."
    assert "_hf_hook" in vars(hooked), "accelerate keeps the hook elsewhere: mend backbone/offloaded.py."


def test_a_parameter_keeps_what_acts_on_its_gradient_where_it_is_looked_for():
    weight = nn.Parameter(torch.ones(2))
    weight.register_post_accumulate_grad_hook(lambda parameter: None)
    assert weight._post_accumulate_grad_hooks, "hooks of gradients are kept elsewhere: mend forward/replicas.py."


def test_a_layer_that_shortens_frames_says_by_how_much():
    seamless = importlib.import_module("transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2")
    assert "_compute_sub_sample_lengths_from_attention_mask" in inspect.getsource(seamless), "mend forward/frames.py."


def test_distributed_wrappers_leave_out_what_a_module_names():
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(nn.parallel.DistributedDataParallel.__init__), (
        "DDP takes the names of what it leaves out elsewhere: mend train/training.py."
    )


def test_parsers_of_other_packages_list_their_flags():
    from accelerate.commands.launch import launch_command_parser

    actions = launch_command_parser()._actions
    assert any("--num_processes" in action.option_strings for action in actions), "mend cli/launch.py: split."


def test_modules_that_are_trained_in_full_list_their_adapters():
    from peft.utils.other import ModulesToSaveWrapper

    assert "default" in ModulesToSaveWrapper(nn.Linear(1, 1), "default")._adapters, "mend tuner/checks.py."


def test_wrapped_parameters_say_whether_they_are_transposed():
    from peft.tuners.lora.layer import ParamWrapper

    assert "_did_swap_in_out_features" in inspect.getsource(ParamWrapper), (
        "stock LoRA on experts tells the layout of its matrices elsewhere: mend layers/accelerated_lora.py."
    )


def test_transformers_keeps_what_is_asked_of_experts_models_and_recorded_outputs():
    capturing = importlib.import_module("transformers.utils.output_capturing")
    assert "_output_capturing_hooks_installed" in inspect.getsource(capturing), "mend tuner/router_outputs.py."
    moe = importlib.import_module("transformers.integrations.moe")
    assert "_apply_gate" in inspect.getsource(moe), "gates of fused experts are elsewhere: mend fused_experts.py."
    loading = importlib.import_module("transformers.core_model_loading")
    reading = importlib.import_module("transformers.modeling_utils")
    assert "_weight_conversions" in inspect.getsource(loading) + inspect.getsource(reading), (
        "names of checkpoints are converted elsewhere: mend tools/checkpoint_layout.py."
    )


# Names of Python itself, and those that a module of another package may or may not have, for which there is a default.
OF_PYTHON = {"_", "_fields", "_getframe", "_parser", "_constants", "_hashable_values_", "_per_second"}
MAY_LACK = {
    "_checkpoint_conversion_mapping",
    "_get_feat_extract_output_lengths",
    "_get_subsampling_output_length",
    "_is_expert_parallel",
}


ENDINGS = {"_attention", "_bias", "_dropout"}  # of public names


def private_names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Private names that a file reads or imports, and those that it defines itself."""
    read, own = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Attribute):
            (own if isinstance(node.ctx, ast.Store) else read).add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            read |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            read.add(node.value)
    return {name for name in read if re.match(r"_(?!_)", name)}, own


def test_every_private_name_of_another_library_that_is_relied_on_is_looked_at_here():
    root = Path(__file__).parents[1]
    trees = [ast.parse(path.read_text()) for room in ("moe_peft", "train") for path in (root / room).rglob("*.py")]
    found = [private_names(tree) for tree in trees]
    own = set().union(*(names for _, names in found))
    foreign = set().union(*(names for names, _ in found)) - own - OF_PYTHON - MAY_LACK - ENDINGS
    foreign = {name for name in foreign if not name.startswith("_moe_peft") and len(name) > 2}
    text = Path(__file__).read_text()
    missing = sorted(name for name in foreign if not re.search(rf"\b{name}\b", text))
    assert not missing, f"{missing}: private names of other libraries need a canary here, or a public way."


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


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_cpu_says_whether_it_multiplies_in_16_bits(name):
    asked = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    assert asked is not None and isinstance(asked(), bool), (
        "torch tells 16-bit products of a CPU elsewhere: mend ops/dtypes.py, or they are slow where it has none."
    )


def test_torch_says_whether_any_autocast_is_on():
    advice = "mend ops/dtypes.py: ask torch.is_autocast_enabled of each kind of device"
    assert torch._C._is_any_autocast_enabled() is False, advice
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch._C._is_any_autocast_enabled() is True, advice
