"""Adapters on models that tensor and expert parallelism split equal those on whole ones, or say why they cannot."""

from __future__ import annotations

import json
import sys

import pytest
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

from tests.contract.cases import DECODER, tiny_olmoe
from tests.processes.parallel_worker import CASES, WAYS
from tests.processes.together import run_together

pytestmark = pytest.mark.multi_process
REFUSED = {
    "esft-full": "Or set expert_adapter='lora', whose experts are whole on every process",
    "expert-lora": "ep_implementation='moe_peft'), or with fsdp_size=N",
}


def tiny_qwen3_moe() -> Qwen3MoeForCausalLM:
    """Its attention is split column-wise and row-wise, without whole inputs or outputs as OLMoE's."""
    set_seed(0)
    sizes = {"moe_intermediate_size": 16, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**DECODER, **sizes, "head_dim": 8}))


def tiny_gpt_oss() -> GptOssForCausalLM:
    """Matrices with the input's width first, biases, joined gates."""
    set_seed(0)
    sizes = {"intermediate_size": 16, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**{**DECODER, **sizes, "head_dim": 8}))


def check(model, way, cases, folder):
    model.save_pretrained(folder / "model")
    command = [sys.executable, "-m", "tests.processes.parallel_worker"]
    run_together([[*command, str(rank), str(folder), way, ",".join(cases)] for rank in range(2)], timeout=900)
    for rank in range(2):
        found = json.loads((folder / f"{way}.{rank}.json").read_text())
        assert found.keys() == set(cases)
        for case, facts in found.items():
            if case in REFUSED:
                assert REFUSED[case] in facts["refused"]
            else:
                assert facts.get("logits", 1) < 1e-5 and facts["gradients"] < 2e-5, (way, case, facts)


def test_split_linear_layers_and_experts_are_followed(tmp_path):
    check(tiny_qwen3_moe(), "tp+ep", ["perft-e", "molora", "mov"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", [tiny_olmoe, tiny_qwen3_moe], ids=["olmoe", "qwen3_moe"])
def test_every_adapter_equals_that_of_one_process_or_is_refused(model, way, tmp_path):
    check(model(), way, list(CASES), tmp_path)
