"""Modules saved with an adapter, and what an adapter may not be put on."""

import pytest

from . import rows
from .retarget import retarget
from .sources import load
from .stand_in import install, stand_ins

peft = load("test_other")
# Some of the tests name modules that the tiny models lack, of which we warn.
pytestmark = pytest.mark.filterwarnings("default::moe_peft.MoePeftWarning")


# With one expert, so that what merges can be merged.
@pytest.fixture(autouse=True, params=stand_ins(one_expert=True))
def our_types(request, monkeypatch):
    install(monkeypatch, peft, request.param)


test_modules_to_save_targets_module_dict_raises = peft.test_modules_to_save_targets_module_dict_raises
test_get_peft_model_revision_warning = peft.test_get_peft_model_revision_warning
test_load_multiple_adapters_different_modules_to_save = peft.test_load_multiple_adapters_different_modules_to_save

TestModulesToSaveAttributeAccess = retarget(
    peft.TestModulesToSaveAttributeAccess,
    keep=(
        "test_transient_attribute_access_default_adapter",
        "test_transient_attribute_access_non_default_adapter",
        "test_transient_attribute_access_disabled_adapter",
        "test_transient_attribute_access_uninitialized_adapter",
        "test_transient_attribute_access_attr_does_not_exist_on_modules_to_save",
        "test_transient_attribute_access_attr_does_not_exist_on_original_module",
        "test_transient_attribute_access_non_existing_adapter",
    ),
)
TestModulesToSaveKwargsOnlyForward = retarget(
    peft.TestModulesToSaveKwargsOnlyForward,
    keep=(
        "test_kwargs_only_forward_active_adapter",
        "test_kwargs_only_forward_disabled_adapter",
        "test_kwargs_only_forward_multi_adapter",
    ),
)
TestModulesToSaveUnloadNoActiveAdapter = retarget(
    peft.TestModulesToSaveUnloadNoActiveAdapter, keep=("test_unload_with_inactive_modules_to_save",)
)
TestModulesToSaveNameSubstringBug = retarget(
    peft.TestModulesToSaveNameSubstringBug, keep=("test_load_merged_and_unmerged_same_weights",)
)
TestTargetingAuxiliaryTrainingWrapper = retarget(
    peft.TestTargetingAuxiliaryTrainingWrapper,
    keep=(
        "test_nested_ignores_modules_to_save",
        "test_targeting_module_to_save_raises",
        "test_modules_to_save_targets_tuner_layer_raises",
        "test_targeting_trainable_tokens_raises",
    ),
)
TestAdapterTargeting = retarget(
    peft.TestAdapterTargeting,
    inline={
        "test_self_targeting_is_ignored": [
            pytest.param(row.values[0], {**row.values[1], "target_modules": "l1.*"}, id=row.id)
            for row in rows.config_rows()
        ]
    },
)
