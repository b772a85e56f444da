"""Injection without a PeftModel, state dicts of adapters and of bases, and names that could be confused."""

import pytest

from . import rows
from .retarget import retarget
from .sources import load
from .stand_in import install, stand_ins
from .tiny_models import tiny_model

peft = load("test_low_level_api")
helpers = load("test_helpers")
# Some of the tests name modules that the tiny models lack, of which we warn.
pytestmark = pytest.mark.filterwarnings("default::moe_peft.MoePeftWarning")


@pytest.fixture(autouse=True, params=stand_ins())
def our_types(request, monkeypatch):
    for module in (peft, helpers):
        install(monkeypatch, module, request.param, {"AutoModelForSequenceClassification": "bert-classifier"})


def argvalues(test, position):
    """The table of one of the marks of a test."""
    return getattr(peft.TestInjectAdapterFromStateDict, test).pytestmark[position].args[1]


SAME_LAYERS = "test_inject_from_state_dict_and_from_config_target_same_layers"
TABLES = (argvalues(SAME_LAYERS, 0), argvalues(SAME_LAYERS, 1))
CONFIGS, MODELS = sorted(TABLES, key=lambda table: isinstance(table[0], tuple))
LOCAL_MODELS = [
    pytest.param((cls, tiny_model(name)), id=name)
    for cls, name in (
        (peft.AutoModelForCausalLM, "llama"),
        (peft.AutoModel, "bert"),
        (peft.AutoModelForSeq2SeqLM, "t5"),
    )
]

TestInjectAdapterFromStateDict = retarget(
    peft.TestInjectAdapterFromStateDict,
    (MODELS, LOCAL_MODELS),
    (CONFIGS, [pytest.param(row.values[0](**row.values[1]), id=row.id) for row in rows.config_rows()]),
    keep=(
        "test_inject_from_state_dict_transformers",
        "test_inject_from_state_dict_transformers_irregular_targets",
        "test_inject_from_state_dict_low_cpu_mem_usage",
        "test_inject_from_state_dict_compiled_model",
    ),
)
TestLowLevelFunctional = retarget(
    peft.TestLowLevelFunctional,
    keep=("test_inject_adapter_in_model", "test_get_peft_model_state_dict", "test_modules_to_save"),
)
TestPeftStateDict = retarget(
    peft.TestPeftStateDict,
    keep=(
        "test_get_peft_model_state_dict_removes_adapter_name",
        "test_get_peft_model_state_dict_removes_non_defaul_adapter_name",
        "test_get_peft_model_state_dict_removes_adapter_name_when_same_as_module_name",
        "test_get_and_set_peft_model_state_dict_normal_names",
        "test_get_and_set_peft_model_state_dict_peft_prefix_in_module_name",
        "test_get_and_set_peft_model_state_dict_weight_in_module_name",
        "test_get_and_set_peft_model_state_dict_bias_in_module_name",
        "test_get_and_set_peft_model_state_dict_adapter_name_same_as_module_name",
        "test_trained_modules_to_save_module_named_like_peft_prefix_round_trip",
        "test_set_peft_model_state_dict_preserves_input",
    ),
)
TestGetBaseModelStateDict = retarget(
    peft.TestGetBaseModelStateDict,
    keep=("test_strict_missing_keys", "test_strict_unexpected_keys", "test_multiple_adapters"),
)
TestStateDictFsdpShapeValidation = retarget(
    peft.TestStateDictFsdpShapeValidation, keep=("test_save_pretrained_succeeds_for_normal_lora",)
)
TestCheckIsPeftModel = retarget(
    helpers.TestCheckIsPeftModel, keep=("test_local_model_valid", "test_local_model_non_default_name")
)
