"""Causal language models: dense, with tied embeddings, with Conv1D layers, and with experts of their own."""

import pytest

from . import rows
from .retarget import retarget
from .sources import load

peft = load("test_decoder_models")
common = load("testing_common")
TASK = {"task_type": "CAUSAL_LM"}
SEVERAL, ONE, BLOCKS = rows.config_rows(**TASK), rows.one_expert_rows(**TASK), rows.block_rows(**TASK)
ATTENTION = rows.config_rows(**TASK, target_modules=["q_proj", "v_proj"])


@pytest.fixture(autouse=True)
def admit_to_mixed_batches(request, monkeypatch):
    """Let our types pass the guards of the mixed batch tests, which know stock LoRA alone."""
    if "mixed_adapter_batches" in request.node.name:
        config_cls = request.node.callspec.params["config_cls"]
        monkeypatch.setattr(peft, "LoraConfig", config_cls)
        monkeypatch.setattr(common, "LoraConfig", config_cls)


TestDecoderModels = retarget(
    peft.TestDecoderModels,
    (peft.ALL_CONFIGS, [*SEVERAL, *ONE, *BLOCKS]),
    (peft.PEFT_DECODER_MODELS_TO_TEST, rows.model_rows("llama")),
)
TestOtherDecoderModels = retarget(
    peft.TestDecoderModels,
    (peft.ALL_CONFIGS, [*SEVERAL, *BLOCKS]),
    (peft.PEFT_DECODER_MODELS_TO_TEST, rows.model_rows("llama-tied", "gpt2")),
)
TestSparseDecoderModels = retarget(
    peft.TestDecoderModels,
    (peft.ALL_CONFIGS, [*ATTENTION, *BLOCKS, *rows.expert_rows(**TASK)]),
    (peft.PEFT_DECODER_MODELS_TO_TEST, rows.model_rows("olmoe")),
)
