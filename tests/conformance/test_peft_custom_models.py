"""Toy models: the life of adapters, dtypes, saving, several active adapters, mixed batches, FSDP state dicts."""

from . import rows
from .retarget import retarget
from .sources import load

peft = load("test_custom_models")
CASES = (peft.TEST_CASES, rows.custom_model_rows())
CLASSES = (peft.ALL_PEFT_CONFIG_CLASSES, rows.CLASSES)
TWO_ADAPTERS = (peft.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES, rows.two_adapter_rows())
LIN0, LIN1 = {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}
MIXED_BATCH = (peft.MIXED_ADAPTER_TEST_CASES, rows.mixed_batch_rows(LIN0, LIN0))
SAVED = {**LIN0, "modules_to_save": ["lin1"]}

TestPeftCustomModel = retarget(peft.TestPeftCustomModel, CASES, CLASSES)
TestMultipleActiveAdapters = retarget(peft.TestMultipleActiveAdapters, TWO_ADAPTERS)
TestRequiresGrad = retarget(peft.TestRequiresGrad, CLASSES)
TestMixedAdapterBatches = retarget(
    peft.TestMixedAdapterBatches,
    MIXED_BATCH,
    inline={
        "test_mixed_adapter_batches_different_target_layers": rows.mixed_batch_rows(LIN0, LIN1),
        "test_mixed_adapter_batches_multiple_modules_to_save": rows.mixed_batch_rows(SAVED, SAVED),
        "test_mixed_adapter_batches_partly_overlapping_target_layers": rows.mixed_batch_rows(
            LIN0, {"target_modules": ["lin0", "lin1"]}
        ),
        "test_mixed_adapter_batches_lora_wrong_adapter_name_raises": rows.wrong_name_rows(),
    },
)
TestPeftFsdpStateDict = retarget(peft.TestPeftFsdpStateDict, CASES)
