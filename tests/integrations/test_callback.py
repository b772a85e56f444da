"""Inside a real trainer: router losses weigh the same under any accumulation, and routers stay float32."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch.optim import SGD
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from moe_peft import LoraMoeConfig, MoePeftWarning, RoutedConfig, telemetry
from moe_peft.forward.tracker import find_tracker
from moe_peft.integrations import GroupCollator, MoeCallback, attach
from tests.contract.cases import randomize
from tests.tiny import tiny_llama

COEF = 0.5


def rows(count: int = 4, length: int = 6) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": row, "task_type": index % 2} for index, row in enumerate(ids)]


def adapted(coef: float = COEF, **fields):
    model = get_peft_model(tiny_llama(), RoutedConfig(num_experts=4, router_aux_loss_coef=coef, **fields))
    randomize(model)
    return model


def gradients_after_one_step(model, accumulation: int, callbacks: list, tmp_path, **arguments) -> dict:
    """Train one optimizer step of plain SGD with rate one, and read the gradient off the change of the weights."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list([{k: v for k, v in row.items() if k != "task_type"} for row in rows()]),
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )
    trainer.train()
    return {name: before[name] - p.detach() for name, p in model.named_parameters() if p.requires_grad}


def explicit_gradients(accumulation: int) -> dict[str, torch.Tensor]:
    """Mean over micro-batches of COEF * load balancing, by autograd on the routings that the test records."""
    model = adapted(coef=0.0).train()
    batch = torch.tensor([row["input_ids"] for row in rows()])
    total = torch.zeros(())
    for part in batch.chunk(accumulation):
        with telemetry.record(model) as routings:
            model(input_ids=part)
        for made in routings.values():
            requests = torch.nn.functional.one_hot(made[0].experts, 4).sum((0, 1)).float()
            share = requests / requests.sum()
            total = total + COEF * 4 * (share * made[0].probs.mean(0)).sum() / accumulation
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_router_losses_are_the_mean_over_micro_batches(accumulation, tmp_path):
    with_losses = gradients_after_one_step(adapted(), accumulation, [MoeCallback()], tmp_path, seed=0)
    without = gradients_after_one_step(adapted(coef=0.0), accumulation, [MoeCallback()], tmp_path, seed=0)
    if accumulation == 4:
        # The order of single rows does not matter to a mean, so the explicit loss needs no sampler.
        expected = explicit_gradients(accumulation)
        for name, gradient in expected.items():
            torch.testing.assert_close(with_losses[name] - without[name], gradient, rtol=1e-3, atol=2e-6)
    router = next(name for name in with_losses if "layers.1.mlp.down_proj" in name and "router" in name)
    assert not torch.allclose(with_losses[router], without[router], atol=1e-6)


def test_without_the_callback_accumulation_counts_the_losses_too_often(tmp_path):
    right = gradients_after_one_step(adapted(), 4, [MoeCallback()], tmp_path, seed=0)
    with pytest.warns(MoePeftWarning, match=r"call moe_peft.attach\(trainer\)"):
        wrong = gradients_after_one_step(adapted(), 4, [], tmp_path, seed=0)
    router = next(name for name in right if "layers.1.mlp.down_proj" in name and "router" in name)
    assert not torch.allclose(right[router], wrong[router], rtol=1e-2, atol=1e-6)


def test_last_window_of_an_epoch_weighs_by_its_own_length(tmp_path):
    seen = []

    class Watch(MoeCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            seen.append(find_tracker(kwargs["model"]).loss_scale)

    model = adapted()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        num_train_epochs=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "task_type"} for row in rows(4)])
    Trainer(model=model, args=args, train_dataset=data, callbacks=[Watch()]).train()
    assert seen == pytest.approx([1 / 3, 1.0, 1 / 3, 1.0])
    assert find_tracker(model).loss_scale == 1.0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer_trains_saves_and_carries_the_sample_groups(checkpointing, tmp_path, tiny_tokenizer):
    config = LoraMoeConfig(task_type="CAUSAL_LM", num_experts=4, expert_groups=[0, 0, 1, 1])
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=checkpointing,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset=Dataset.from_list([{k: v for k, v in row.items() if k != "labels"} for row in rows(8)]),
        processing_class=tiny_tokenizer,
        peft_config=config,
    )
    with pytest.raises(ValueError, match="the batch has no column 'task_type'"):
        trainer.train()
    attach(attach(trainer))
    assert isinstance(trainer.data_collator, GroupCollator)
    assert not isinstance(trainer.data_collator.collator, GroupCollator)
    assert sum(isinstance(callback, MoeCallback) for callback in trainer.callback_handler.callbacks) == 1
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert "localized_balancing" in next(iter(find_tracker(trainer.model).latest.layers.values()))[0].losses


@pytest.fixture
def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_a_trainer_without_a_routed_adapter_is_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(model=tiny_llama(), args=args)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no routed adapter"):
        attach(trainer)
    assert "train" not in vars(trainer) and "log" not in vars(trainer)
