"""attach(trainer): the routing's entries in the logs of every kind of trainer, and refusals before the first step."""

from __future__ import annotations

import pytest
from datasets import Dataset
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from moe_peft import MoePeftWarning, PerftConfig, RoutedConfig
from moe_peft.integrations import MoeCallback, attach
from moe_peft.quantization.four_bit import dequantize_on_read, quantize
from tests.contract.cases import tiny_olmoe
from tests.integrations.test_callback import adapted, rows, tiny_tokenizer  # noqa: F401
from tests.tiny import tiny_llama

STATISTICS = {"load_balancing", "load_entropy", "max_over_mean_load", "dead_experts", "confidence"}


class Tracker(TrainerCallback):
    """Sees what tensorboard, wandb and trackio see: the entries of on_log, before any callback that is added later."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def settings(folder, **fields):
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **fields,
    }


def plain_trainer(folder, tokenizer, tracker, **fields):
    data = Dataset.from_list([{k: v for k, v in row.items() if k != "task_type"} for row in rows(8)])
    args = TrainingArguments(**settings(folder, eval_strategy="steps", eval_steps=4, **fields))
    return Trainer(
        model=adapted(), args=args, train_dataset=data, eval_dataset=data, callbacks=[tracker] if tracker else None
    )


def sft_trainer(folder, tokenizer, tracker, **fields):
    data = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows(8)])
    args = SFTConfig(**settings(folder, **fields))
    config = RoutedConfig(task_type="CAUSAL_LM", num_experts=4)
    return SFTTrainer(
        tiny_llama(), args, train_dataset=data, processing_class=tokenizer, peft_config=config, callbacks=[tracker]
    )


def dpo_trainer(folder, tokenizer, tracker, **fields):
    data = Dataset.from_list([{"prompt": "w3 w4", "chosen": " w5 w6", "rejected": f" w7 w{8 + i}"} for i in range(8)])
    args = DPOConfig(**settings(folder, **fields))
    config = RoutedConfig(task_type="CAUSAL_LM", num_experts=4)
    return DPOTrainer(
        tiny_llama(),
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[tracker],
    )


@pytest.mark.parametrize("build", [plain_trainer, sft_trainer, dpo_trainer])
def test_training_logs_carry_the_routing_to_history_and_trackers(build, tmp_path, tiny_tokenizer):  # noqa: F811
    tracker = Tracker()
    trainer = attach(build(tmp_path, tiny_tokenizer, tracker))
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2
    for entry in history:
        assert {f"moe/{name}" for name in STATISTICS} <= entry.keys()
        assert entry["moe/layers_0-0/load_entropy"] != entry["moe/layers_1-1/load_entropy"]
        assert 0 < entry["moe/load_entropy"] <= 1 <= entry["moe/max_over_mean_load"] <= 4
    with_loss = [entry for entry in tracker.seen if "loss" in entry]
    assert [entry["moe/load_balancing"] for entry in with_loss] == [e["moe/load_balancing"] for e in history]
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert others and not any(key.startswith("moe/") for entry in others for key in entry)


def test_the_logged_loss_is_that_of_the_task(tmp_path, tiny_tokenizer):  # noqa: F811
    losses = []
    for coef in (0.0, 0.5):
        model_trainer = plain_trainer(tmp_path, tiny_tokenizer, Tracker(), learning_rate=0.0, seed=1)
        model_trainer.model = adapted(coef)
        attach(model_trainer).train()
        losses.append([entry["loss"] for entry in model_trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_telemetry_measures_in_every_nth_step_and_zero_switches_it_off(tmp_path, tiny_tokenizer):  # noqa: F811
    measured = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            measured.append(callback.meter.micro_batches)

    trainer = attach(plain_trainer(tmp_path, tiny_tokenizer, Tracker(), logging_steps=100), telemetry_steps=2)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, MoeCallback))
    trainer.add_callback(Watch())
    trainer.train()
    assert measured == [1, 1, 2, 2]
    off = attach(plain_trainer(tmp_path, tiny_tokenizer, Tracker()), telemetry_steps=0)
    off.train()
    assert not any(key.startswith("moe/") for entry in off.state.log_history for key in entry)


@pytest.mark.parametrize("name", ["telemetry_steps", "layer_groups"])
def test_negative_numbers_are_refused(name, tmp_path, tiny_tokenizer):  # noqa: F811
    with pytest.raises(ValueError, match=f"{name}=-1 must be 0"):
        attach(plain_trainer(tmp_path, tiny_tokenizer, Tracker()), **{name: -1})


def test_attaching_twice_logs_once(tmp_path, tiny_tokenizer):  # noqa: F811
    trainer = plain_trainer(tmp_path, tiny_tokenizer, Tracker())
    log = attach(trainer).log
    assert attach(trainer).log is log


def test_vllm_is_refused_for_an_adapter_that_cannot_be_merged(tmp_path, tiny_tokenizer):  # noqa: F811
    trainer = plain_trainer(tmp_path, tiny_tokenizer, Tracker())
    trainer.args.use_vllm = True
    with pytest.raises(ValueError, match=r"use_vllm=True merges the adapter 'default'.*Set use_vllm=False"):
        attach(trainer)
    trainer.add_callback(MoeCallback())
    with pytest.raises(ValueError, match="use_vllm=True merges the adapter 'default'"):
        trainer.train()
    single = plain_trainer(tmp_path, tiny_tokenizer, Tracker())
    single.model = sft_model(num_experts=1)
    single.args.use_vllm = True
    attach(single)


def sft_model(num_experts):
    return get_peft_model(
        tiny_llama(), RoutedConfig(num_experts=num_experts, router="dense", router_aux_loss_coef=0.0)
    )


def test_continuous_batching_in_sixteen_bit_warns(tmp_path, tiny_tokenizer):  # noqa: F811
    trainer = plain_trainer(tmp_path, tiny_tokenizer, Tracker())
    trainer.args.use_transformers_continuous_batching = True
    attach(trainer)
    trainer.args.bf16 = True
    with pytest.warns(MoePeftWarning, match="turns the experts of the adapter to 16 bit for good"):
        attach(trainer)


def test_several_gpus_in_one_process_are_refused(tmp_path, tiny_tokenizer):  # noqa: F811
    trainer = plain_trainer(tmp_path, tiny_tokenizer, Tracker())
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="One process drives n_gpu=2 GPUs"):
        attach(trainer)


@pytest.mark.bnb
def test_experts_in_four_bits_without_gradient_checkpointing_warn(tmp_path, tiny_tokenizer, recwarn):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    trainer = plain_trainer(tmp_path, tiny_tokenizer, Tracker())
    base = tiny_olmoe()
    for layer in base.model.layers:
        values = quantize(layer.mlp.experts.down_proj)
        dequantize_on_read(layer.mlp.experts, "down_proj", *values)
    trainer.model = get_peft_model(base, PerftConfig(variant="E"))
    trainer.args.gradient_checkpointing = True
    attach(trainer)
    assert not [w for w in recwarn if "dequantized" in str(w.message)]
    trainer.args.gradient_checkpointing = False
    with pytest.warns(MoePeftWarning, match="keeps the dequantized experts of all layers"):
        attach(trainer)


def test_what_is_no_trainer_is_refused():
    with pytest.raises(ValueError, match=r"PeftModel is no trainer .*Write moe_peft.attach\(trainer\)"):
        attach(get_peft_model(tiny_llama(), RoutedConfig()))
