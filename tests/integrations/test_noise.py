"""Where a trainer compares passes of a model, training passes compute what evaluation does, and attach says so."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOTrainer, KTOConfig, KTOTrainer, RLOOTrainer, SFTConfig, SFTTrainer

from moe_peft import (
    EsftConfig,
    LoraMoeConfig,
    MoePeftWarning,
    MoloraConfig,
    MovConfig,
    PerftConfig,
    RoutedConfig,
    SiraConfig,
    attach,
)
from moe_peft.integrations.noise import compares_passes, keeps_dropout, without_noise
from tests.contract.cases import randomize, tiny_olmoe
from tests.integrations.trainers import TRAINERS, preferences, prompts, shared, token_rows, tokenizer, unpaired
from tests.slices import sliced
from tests.tiny import padded_batch, tiny_llama

NOISY = {"router_jitter_noise": 0.3, "expert_dropout": 0.3, "lora_dropout": 0.3, "capacity_factor": 0.5}
LLAMA = {
    "loramoe": lambda **k: LoraMoeConfig(num_experts=4, r=2, **k),
    "loramoe with dropout": lambda **k: LoraMoeConfig(num_experts=4, r=2, lora_dropout=0.5, **k),
    "molora": lambda **k: MoloraConfig(num_experts=4, r=2, **k),
    "sira": lambda **k: SiraConfig(num_experts=4, top_k=2, r=2, **k),
    "mov": lambda **k: MovConfig(num_experts=3, **k),
    "perft R": lambda **k: PerftConfig(num_experts=4, top_k=2, r=2, **k),
    "perft S": lambda **k: PerftConfig(variant="S", r=2, **k),
    "routed": lambda **k: RoutedConfig(num_experts=4, top_k=2, r=2, **k),
    "noisy": lambda **k: RoutedConfig(num_experts=4, top_k=2, r=2, router="capacity", **NOISY, **k),
    "bottleneck": lambda **k: RoutedConfig(num_experts=4, r=2, experts="bottleneck", lora_dropout=0.5, **k),
}
OLMOE = {
    "perft E": lambda **k: PerftConfig(variant="E", r=2, **k),
    "perft D": lambda **k: PerftConfig(variant="D", num_experts=2, r=2, **k),
    "esft": lambda **k: EsftConfig(experts={"0": [1, 3]}, **k),
    "esft lora": lambda **k: EsftConfig(experts={"0": [1, 3]}, expert_adapter="lora", r=2, lora_dropout=0.5, **k),
}
CASES = [(tiny_llama, LLAMA[name]) for name in LLAMA] + [(tiny_olmoe, OLMOE[name]) for name in OLMOE]
NAMES = [*LLAMA, *OLMOE]
# What `make test` trains: every source of noise, and an adapter of each kind of place.
TRAINED = ("loramoe with dropout", "sira", "mov", "noisy", "perft E", "esft lora")
TRAINED_CASES = [
    pytest.param(*case, id=name, marks=[] if name in TRAINED else [pytest.mark.slow])
    for case, name in zip(CASES, NAMES, strict=True)
]
ONLINE = sliced([(name,) for name in LLAMA], [(name,) for name in ("sira", "noisy", "bottleneck")])


def trained(build, config, folder):
    """A trained adapter, loaded for further training."""
    model = get_peft_model(build(), config(task_type="CAUSAL_LM"))
    randomize(model)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(build(), folder, is_trainable=True)


def first_loss(trainer):
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.filterwarnings("ignore::moe_peft.MoePeftWarning")
@pytest.mark.parametrize(("build", "config"), TRAINED_CASES)
def test_dpo_of_a_policy_that_equals_its_reference_starts_at_ln_2(build, config, tmp_path):
    model = trained(build, config, tmp_path / "adapter")
    # The balance loss of the backbone's own routers, which TRL would add, is no part of DPO's.
    args = DPOConfig(**shared(tmp_path, 1, max_steps=1, router_aux_loss_coef=0.0))
    trainer = DPOTrainer(model=model, args=args, train_dataset=preferences(), processing_class=tokenizer())
    assert first_loss(attach(trainer)) == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.filterwarnings("ignore::moe_peft.MoePeftWarning")
@pytest.mark.parametrize("name", ["sira", "noisy", "loramoe with dropout"])
def test_kto_of_a_policy_that_equals_its_reference_starts_at_one_half(name, tmp_path):
    model = trained(tiny_llama, LLAMA[name], tmp_path / "adapter")
    args = KTOConfig(**shared(tmp_path, 1, max_steps=1))
    trainer = KTOTrainer(model=model, args=args, train_dataset=unpaired(), processing_class=tokenizer())
    assert first_loss(attach(trainer)) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.filterwarnings("ignore::moe_peft.MoePeftWarning")
@pytest.mark.parametrize("name", ONLINE)
def test_the_first_ratio_of_grpo_is_one(name, tmp_path):
    """Two iterations over the same completions, the first of which is with the policy that made them."""
    ratios = []

    class Watch(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            old = inputs["old_per_token_logps"]
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            new, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, old.shape[1])
            ratios.append((new.detach() - old).exp()[inputs["completion_mask"].bool()])
            return super()._compute_loss(model, inputs)

    args = TRAINERS["grpo"](tmp_path, (0.0, 0.0), 1, num_iterations=2, max_steps=1).args
    trainer = Watch(
        model=trained(tiny_llama, LLAMA[name], tmp_path / "adapter"),
        args=args,
        reward_funcs=lambda completions, **columns: [float(len(text)) for text in completions],
        train_dataset=prompts(),
        processing_class=tokenizer(),
    )
    attach(trainer).train()
    torch.testing.assert_close(ratios[0], torch.ones_like(ratios[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("build", "config"), CASES, ids=NAMES)
def test_passes_without_noise_equal_and_what_was_off_is_on_again(build, config):
    model = get_peft_model(build(), config(task_type="CAUSAL_LM"))
    randomize(model)
    batch = padded_batch([7, 5])
    expected = model.eval()(**batch).logits
    dropouts = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    with pytest.raises(KeyboardInterrupt), without_noise(model.train()):
        torch.testing.assert_close(model(**batch).logits, expected)
        raise KeyboardInterrupt
    after = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert after == dropouts


def test_noise_is_back_after_training(tmp_path):
    model = trained(tiny_llama, LLAMA["noisy"], tmp_path / "adapter")
    args = DPOConfig(**shared(tmp_path, 1, max_steps=1, disable_dropout=False))
    trainer = DPOTrainer(model=model, args=args, train_dataset=preferences(), processing_class=tokenizer())
    with pytest.warns(MoePeftWarning, match=r"DPOTrainer compares.*router_jitter_noise=0.3, capacity_factor=0.5"):
        attach(trainer)
    trainer.train()
    batch = padded_batch([7, 5])
    first, second = (model.train()(**batch).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_trainers_are_asked_not_named(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    own = Trainer(model=tiny_llama(), args=args)
    assert not compares_passes(own)
    own.ref_model = None
    assert compares_passes(own)
    found = {}
    for name, build in TRAINERS.items():
        found[name] = compares_passes(build(tmp_path, (0.0, 0.0), 1))
    assert not found.pop("plain") and not found.pop("sft")
    assert all(found.values())
    assert {"dpo", "kto", "grpo", "rloo", "orpo", "cpo", "reward"} == found.keys()


def test_a_dropout_that_a_trainer_was_told_to_keep_is_kept(tmp_path):
    assert keeps_dropout(DPOConfig(**shared(tmp_path, 1, disable_dropout=False)))
    assert not keeps_dropout(DPOConfig(**shared(tmp_path, 1)))
    assert not keeps_dropout(SFTConfig(**shared(tmp_path, 1)))
    assert not keeps_dropout(TRAINERS["grpo"](tmp_path, (0.0, 0.0), 1).args)


def test_supervised_training_keeps_the_noise_and_says_nothing(tmp_path, recwarn):
    model = get_peft_model(tiny_llama(), LLAMA["noisy"](task_type="CAUSAL_LM"))
    args = SFTConfig(**shared(tmp_path, 1, max_steps=1))
    trainer = SFTTrainer(model=model, args=args, train_dataset=token_rows(), processing_class=tokenizer())
    attach(trainer)
    assert not [w for w in recwarn if issubclass(w.category, MoePeftWarning)]


def test_rloo_with_a_noisy_adapter_trains(tmp_path):
    model = trained(tiny_llama, LLAMA["noisy"], tmp_path / "adapter")
    trainer = RLOOTrainer(
        model=model,
        args=TRAINERS["rloo"](tmp_path, (0.0, 0.0), 1, max_steps=1).args,
        reward_funcs=lambda completions, **columns: [float(len(text)) for text in completions],
        train_dataset=prompts(),
        processing_class=tokenizer(),
    )
    with pytest.warns(MoePeftWarning, match="RLOOTrainer compares passes of the model"):
        attach(trainer)
    trainer.train()
