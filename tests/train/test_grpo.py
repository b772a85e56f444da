"""`accelerate launch train/grpo.py`: rewards by dotted path, by name and by model, and what vLLM cannot do."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.train.tiny_run import (
    assert_trained,
    launch,
    log_entries,
    logits,
    make_base,
    make_data,
    make_tokenizer,
    reloaded,
    run_here,
    words,
    write_run,
)

REWARD = "def low_tokens(completion_ids, **columns):\n    return [-sum(ids) / 100 for ids in completion_ids]\n"
SIZES = {"num_generations": 2, "max_completion_length": 6, "temperature": 1.0}


@pytest.mark.slow
def test_a_launched_run_generates_trains_logs_saves_and_reloads(tmp_path, monkeypatch):
    data = make_data(tmp_path / "data", [{"prompt": words(i, 3)} for i in range(10)])
    base = make_base(tmp_path / "base")
    (tmp_path / "my_rewards.py").write_text(REWARD)
    rewards = {"reward_funcs": ["my_rewards.low_tokens", "get_soft_overlong_punishment"]}
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, max_steps=50, **SIZES, **rewards)
    flags = ("--max_steps", "3", "--moe_num_experts", "3")
    printed = launch("grpo", run, *flags)
    assert "Routed experts: 3 experts of rank 2, router top_k, top 2; 6 places" in printed
    out = tmp_path / "out"
    assert_trained(out, num_tensors=3 * 6)
    assert len(log_entries(out / "checkpoint-3", "rewards/low_tokens/mean")) == 3
    monkeypatch.chdir(tmp_path)
    trainer = run_here("grpo", run, *flags, "--output_dir", str(tmp_path / "here"))
    assert torch.equal(logits(reloaded(base, out)), logits(trainer.model))


def test_a_reward_adapter_of_the_reward_script_scores_completions(tmp_path):
    base = make_base(tmp_path / "base")
    pairs = make_data(tmp_path / "pairs", [{"chosen": words(i, 5), "rejected": words(40 + i, 4)} for i in range(6)])
    reward_run = write_run(tmp_path / "reward", model_name_or_path=base, dataset_name=pairs, max_steps=1)
    reward_trainer = run_here("reward", reward_run)
    chats = [{"prompt": [{"role": "user", "content": words(i, 3)}]} for i in range(10)]
    data = make_data(tmp_path / "data", chats)
    fields = {"reward_model_name_or_path": str(tmp_path / "reward/out"), "reward_funcs": ["think_format_reward"]}
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, max_steps=1, **SIZES, **fields)
    trainer = run_here("grpo", run)
    scorer = trainer.reward_funcs[0]
    assert torch.equal(logits(scorer), logits(reward_trainer.model))
    assert [name for name in trainer.state.log_history[0] if name.endswith("/mean") and "rewards/" in name] == [
        "rewards/base/mean",
        "rewards/think_format_reward/mean",
    ]


def test_a_reward_model_in_full_scores_completions(tmp_path):
    base = make_base(tmp_path / "base")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path / "scorer")
    make_tokenizer().save_pretrained(tmp_path / "scorer")
    data = make_data(tmp_path / "data", [{"prompt": words(i, 3)} for i in range(10)])
    fields = {"reward_model_name_or_path": str(tmp_path / "scorer")}
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, max_steps=1, **SIZES, **fields)
    trainer = run_here("grpo", run)
    assert trainer.state.log_history[0]["rewards/scorer/std"] > 0


@pytest.mark.parametrize("method", ["loramoe", "molora", "sira", "routed"])
def test_vllm_with_an_adapter_that_cannot_be_merged_is_refused_before_a_model_is_loaded(method, tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    data = make_data(tmp_path / "data", [{"prompt": words(i, 3)} for i in range(10)])
    fields = {"use_vllm": True, "moe_method": method, "reward_funcs": ["think_format_reward"]}
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, **SIZES, **fields)
    with pytest.raises(ValueError, match=r"num_experts=4 depends on its input and cannot be merged\. Write use_vllm"):
        run_here("grpo", run)


def test_vllm_passes_with_an_adapter_that_can_be_merged(tmp_path):
    import grpo
    from trl import GRPOConfig

    from moe_peft import EsftConfig, MovConfig, PerftConfig, RoutedConfig

    args = GRPOConfig(output_dir=str(tmp_path), use_vllm=True, use_cpu=True, bf16=False, report_to=[])
    grpo.refuse_vllm(args, RoutedConfig(task_type="CAUSAL_LM", num_experts=1))
    grpo.refuse_vllm(args, MovConfig(task_type="CAUSAL_LM", num_experts=1))
    grpo.refuse_vllm(args, EsftConfig(task_type="CAUSAL_LM", experts={"1": [0]}))
    for variant in ("S", "D", "E", "R"):
        with pytest.raises(ValueError, match=r"use_vllm: true merges .*cannot be merged"):
            grpo.refuse_vllm(args, PerftConfig(task_type="CAUSAL_LM", variant=variant))


@pytest.mark.parametrize(
    ("reward_funcs", "message"),
    [
        (None, "GRPO has no reward: give --reward_funcs"),
        (["lenght_reward"], r"--reward_funcs lenght_reward: TRL has no such reward; its own are \['accuracy_reward'"),
        (
            ["no_such_module.f"],
            "--reward_funcs no_such_module.f cannot be imported .*Start the script from",
        ),
        (["json.no_such_function"], "--reward_funcs json.no_such_function cannot be imported"),
    ],
)
def test_a_reward_that_cannot_be_found_is_refused_before_a_model_is_loaded(reward_funcs, message, tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    data = make_data(tmp_path / "data", [{"prompt": words(i, 3)} for i in range(10)])
    run = write_run(tmp_path, model_name_or_path=base, dataset_name=data, **SIZES, reward_funcs=reward_funcs)
    with pytest.raises(ValueError, match=message):
        run_here("grpo", run)
