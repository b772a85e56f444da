"""Quantized layers: every backend that is installed, with each type."""

from . import rows
from .retarget import retarget
from .sources import load
from .tiny_models import tiny_model

peft = load("test_quantization")
TARGETS = ["q_proj", "v_proj"]
for loader in peft.QUANTIZATION_BACKENDS:
    loader.model_id = tiny_model("llama-wide")
    loader.expected_layer_count = 2 * len(TARGETS)

CASES = [*rows.config_rows(target_modules=TARGETS), *rows.one_expert_rows(target_modules=TARGETS)]
TestQuantization = retarget(peft.TestQuantization, (peft.TEST_CASES, CASES))
