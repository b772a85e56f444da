"""Encoder-decoder models, encoders, and sequence classification."""

import pytest

from . import rows
from .retarget import retarget
from .sources import load

seq2seq = load("test_encoder_decoder_models")
features = load("test_feature_extraction_models")
classifiers = load("test_seq_classifier")
common = load("testing_common")


def both(**kwargs):
    return [*rows.config_rows(**kwargs), *rows.one_expert_rows(**kwargs)]


@pytest.fixture(autouse=True)
def admit_to_mixed_batches(request, monkeypatch):
    """Let our types pass the guards of the mixed batch tests, which know stock LoRA alone."""
    if "mixed_adapter_batches" in request.node.name:
        config_cls = request.node.callspec.params["config_cls"]
        monkeypatch.setattr(seq2seq, "LoraConfig", config_cls)
        monkeypatch.setattr(common, "LoraConfig", config_cls)


TestEncoderDecoderModels = retarget(
    seq2seq.TestEncoderDecoderModels,
    (seq2seq.ALL_CONFIGS, [*both(task_type="SEQ_2_SEQ_LM"), *rows.block_rows(task_type="SEQ_2_SEQ_LM")]),
    (seq2seq.PEFT_ENCODER_DECODER_MODELS_TO_TEST, rows.model_rows("t5")),
)
TestPeftFeatureExtractionModel = retarget(
    features.TestPeftFeatureExtractionModel,
    (features.ALL_CONFIGS, both(task_type="FEATURE_EXTRACTION")),
    (features.PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST, rows.model_rows("bert")),
)
TestSequenceClassificationModels = retarget(
    classifiers.TestSequenceClassificationModels,
    (classifiers.ALL_CONFIGS, rows.config_rows(task_type="SEQ_CLS")),
    (classifiers.PEFT_SEQ_CLS_MODELS_TO_TEST, rows.model_rows("llama-classifier", "bert-classifier")),
)
