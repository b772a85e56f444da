"""The scripts train adapters of blocks, experts and vectors on a mixture-of-experts backbone, and save them whole."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.tiny import tiny_mixtral
from tests.train.tiny_run import logits, make_data, make_tokenizer, reloaded, run_here, words, write_run

ROUTED = {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_aux_loss_coef": 0.05}
NOT_ROUTED = {"moe_num_experts": None, "moe_router_aux_loss_coef": None}
WHOLE = {**NOT_ROUTED, "moe_r": None, "moe_method": "esft"}
# flags, tensors in the file: two layers, Mixtral's fused experts in two matrices
CASES = {
    "perft-r": ({"moe_method": "perft", "moe_variant": "R", **ROUTED}, 2 * 3),
    "perft-d": ({"moe_method": "perft", "moe_variant": "D", **NOT_ROUTED}, 2 * 2),
    "perft-e": ({"moe_method": "perft", "moe_variant": "E", **NOT_ROUTED}, 2 * 2),
    "mov": ({"moe_method": "mov", "moe_num_experts": 4, "moe_r": None, "moe_router_aux_loss_coef": None}, 2 * 2 * 2),
    "esft": (WHOLE, 2 * 2),
    "esft-lora": ({**NOT_ROUTED, "moe_method": "esft", "moe_expert_adapter": "lora"}, 2 * 2),
    "esft-router": ({**WHOLE, "moe_train_router": True}, 2 * 3),
}


def make_run(folder, method, rows, sizes=None, **values):
    tiny_mixtral(**(sizes or {})).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    flags, _ = CASES[method]
    if method.startswith("esft"):
        selection = {"experts": {"0": [0, 1], "1": [1, 2]}, "shared_experts": False, "non_expert_modules": False}
        (folder / "expert_config.json").write_text(json.dumps(selection))
        flags = {**flags, "moe_experts": str(folder / "expert_config.json")}
    data = make_data(folder / "data", rows)
    return write_run(folder, model_name_or_path=str(folder / "base"), dataset_name=data, **{**flags, **values})


def assert_all_moved(first, last, method):
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, last))
    own = [name for name in after if "score" not in name]
    assert before.keys() == after.keys() and len(own) == CASES[method][1]
    assert not any(torch.equal(before[name], after[name]) for name in own)


@pytest.mark.parametrize("method", CASES)
def test_supervised_fine_tuning_trains_every_tensor_and_saves_what_it_trained(method, tmp_path):
    rows = [{"text": words(i, 6)} for i in range(8)]
    trainer = run_here("sft", make_run(tmp_path, method, rows, router_aux_loss_coef=0.0))
    out = tmp_path / "out"
    assert_all_moved(out / "checkpoint-1", out, method)
    assert all(torch.isfinite(torch.tensor(e["loss"])) for e in trainer.state.log_history if "loss" in e)
    torch.testing.assert_close(logits(reloaded(str(tmp_path / "base"), out)), logits(trainer.model), rtol=0, atol=0)


@pytest.mark.bnb
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("method", ["perft-e", "esft", "mov"])
def test_four_bits_are_for_the_experts_too_unless_told_otherwise(method, tmp_path, capfd):
    rows = [{"text": words(i, 6)} for i in range(8)]
    # Wide enough for the kernels of evaluation.
    fields = {"router_aux_loss_coef": 0.0, "dtype": "float32", "gradient_checkpointing": True}
    run = make_run(tmp_path, method, rows, {"hidden_size": 64, "intermediate_size": 64}, **fields)
    trainer = run_here("sft", run, "--load_in_4bit", "--eval_strategy", "steps", "--eval_steps", "2")
    # Two layers of four experts with three matrices of 64 x 64, then half a byte a weight and a scale for 64 of them.
    assert "Fused experts: 0.4 MB in float32, 0.1 MB in 4 bits" in capfd.readouterr().out
    assert expert_dtypes(trainer.model) == {torch.uint8}
    assert_all_moved(tmp_path / "out/checkpoint-1", tmp_path / "out", method)
    trainer = run_here("sft", run, "--load_in_4bit", "--moe_quantize_experts", "false")
    assert expert_dtypes(trainer.model) == {torch.float32} and "Fused experts" not in capfd.readouterr().out


def expert_dtypes(model):
    """Dtypes of the backbone's experts."""
    names = (n for n, _ in model.named_parameters() if ".experts." in n and "esft_" not in n and "perft_" not in n)
    return {model.get_parameter(name).dtype for name in names}


@pytest.mark.filterwarnings("ignore:RewardTrainer compares passes")
@pytest.mark.parametrize("method", ["perft-r", "esft"])
def test_reward_models_train_too(method, tmp_path):
    rows = [{"chosen": words(20 + i, 5), "rejected": words(40 + i, 4)} for i in range(6)]
    trainer = run_here("reward", make_run(tmp_path, method, rows))
    out = tmp_path / "out"
    assert_all_moved(out / "checkpoint-1", out, method)
    fields = {"num_labels": 1, "pad_token_id": 0}
    loaded = reloaded(str(tmp_path / "base"), out, AutoModelForSequenceClassification, **fields)
    torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("esft", {"moe_experts": None}, r"experts=None must be a selection, as \{'1': \[8, 26\]\}.*select_experts"),
        ("esft", {"moe_num_experts": 3}, r"run\.yaml: moe_num_experts has no meaning for moe_method esft"),
        ("perft-e", {"moe_top_k": 2}, "top_k=2 must be left at None: variant 'E' fixes it"),
        ("perft-r", {"moe_variant": "X"}, "variant='X' must be one of 'R', 'E', 'D', 'S'"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(method, flags, message, tmp_path):
    rows = [{"text": words(i, 6)} for i in range(4)]
    run = make_run(tmp_path, method, rows, **{"router_aux_loss_coef": 0.0, **flags})
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        run_here("sft", run)
