"""TRL's own reference adapter: DPO on a trained adapter starts with policy and reference alike."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

from moe_peft import accelerate_expert_lora, expert_parameters
from moe_peft.layers import accelerated_lora
from tests.contract.cases import METHODS, randomize, tiny_olmoe
from tests.integrations.test_callback import tiny_tokenizer  # noqa: F401
from tests.tiny import padded_batch, tiny_llama

CASES = [("loramoe", tiny_llama), ("sira", tiny_llama), ("mov", tiny_llama), ("perft-r", tiny_llama)]
CASES += [("perft-r", tiny_olmoe), ("perft-e", tiny_olmoe), ("esft", tiny_olmoe), ("esft-lora", tiny_olmoe)]


@pytest.mark.parametrize(("method", "build"), CASES)
def test_reference_adapter_of_dpo_equals_the_trained_one_and_stays(method, build, tmp_path, tiny_tokenizer):  # noqa: F811
    model = get_peft_model(build(), METHODS[method](task_type="CAUSAL_LM"))
    randomize(model)
    check_reference_adapter(model, tmp_path, tiny_tokenizer)


def test_reference_adapter_of_dpo_runs_accelerated_beside_the_trained_one(tmp_path, tiny_tokenizer):  # noqa: F811
    base = tiny_olmoe()
    config = LoraConfig(r=2, target_modules=[], target_parameters=expert_parameters(base), task_type="CAUSAL_LM")
    model = accelerate_expert_lora(get_peft_model(base, config))
    randomize(model)
    ran = []
    run = accelerated_lora._run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerated_lora, "_run", lambda *args: (ran.append(args[1][0].active_adapters), run(*args))[1])
        check_reference_adapter(model, tmp_path, tiny_tokenizer)
    assert ["ref"] in ran and ["default"] in ran


def check_reference_adapter(model, tmp_path, tiny_tokenizer):  # noqa: F811
    data = [{"prompt": "w3 w4", "chosen": " w5 w6", "rejected": f" w7 w{8 + i}"} for i in range(8)]
    args = DPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tiny_tokenizer
    )
    assert set(trainer.model.peft_config) == {"default", "ref"}
    batch, policy = padded_batch([7, 5]), trainer.model.eval()
    expected = policy(**batch).logits
    policy.set_adapter("ref")
    assert torch.equal(policy(**batch).logits, expected)
    policy.set_adapter("default")
    reference = {n: p.detach().clone() for n, p in policy.named_parameters() if ".ref." in n}
    trainer.train()
    assert all(torch.equal(p, reference[n]) for n, p in policy.named_parameters() if ".ref." in n)
    assert not torch.equal(policy.eval()(**batch).logits, expected)
