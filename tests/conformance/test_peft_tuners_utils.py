"""Which modules are targeted, what an adapted model says of its state, and which keys are an adapter's own."""

import pytest

from .retarget import retarget
from .sources import load
from .stand_in import install, stand_ins

peft = load("test_tuners_utils")
# Some of the tests name modules that the tiny models lack, of which we warn.
pytestmark = pytest.mark.filterwarnings("default::moe_peft.MoePeftWarning")


# With one expert, so that what merges can be merged.
@pytest.fixture(autouse=True, params=stand_ins(one_expert=True))
def our_types(request, monkeypatch):
    install(monkeypatch, peft, request.param)


TestTargetedModuleNames = retarget(
    peft.TestTargetedModuleNames,
    keep=(
        "test_one_targeted_module_regex",
        "test_two_targeted_module_regex",
        "test_one_targeted_module_list",
        "test_two_targeted_module_list",
        "test_layers_to_transform_filters_by_layer_not_expert_index",
    ),
)
TestExcludedModuleNames = retarget(
    peft.TestExcludedModuleNames,
    keep=(
        "test_two_excluded_module_regex",
        "test_two_excluded_module_list",
        "test_multiple_excluded_modules_list",
        "test_all_modules_excluded",
        "test_no_modules_matched",
        "test_no_modules_matched_second_adapter",
        "test_second_adapter_only_modules_to_save_raises",
        "test_targeted_module_names_unique_across_adapters",
        "test_some_modules_excluded_some_unmatched",
        "test_exclude_modules_not_used",
    ),
)
TestModelAndLayerStatus = retarget(
    peft.TestModelAndLayerStatus,
    keep=tuple(
        name
        for name in dir(peft.TestModelAndLayerStatus)
        if name.startswith("test_") and name.endswith(("_small", "_with_modules_to_save", "_with_trainable_tokens"))
    ),
)
TestBaseTunerWarnForTiedEmbeddings = retarget(
    peft.TestBaseTunerWarnForTiedEmbeddings,
    keep=(
        "test_warn_for_tied_embeddings_merge",
        "test_no_warn_for_untied_embeddings_merge",
        "test_no_warn_for_no_target_module_merge",
    ),
)
TestFindMinimalTargetModules = retarget(
    peft.TestFindMinimalTargetModules, keep=("test_get_peft_modules_module_name_is_suffix_of_another_module",)
)
TestTunerStateDictKeyPrefixes = retarget(
    peft.TestTunerStateDictKeyPrefixes,
    keep=(
        "test_prefixes_auxiliary_modules_not_included",
        "test_prefixes_tuner_layer_inside_auxiliary_module_not_included",
    ),
)
