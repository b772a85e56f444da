"""Every adapter of a sparse backbone in SFTTrainer: the loss falls, routing is logged, the file holds what trained."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from moe_peft import EsftConfig, MovConfig, PerftConfig, attach
from tests.integrations.trainers import preferences, shared, tokenizer
from tests.methods.esft_models import EXPERTS, sparse_model, token_batch
from tests.slices import diagonal, sliced

LENGTHS = [7, 4, 5, 6, 9, 4, 8, 5]
FORMS = {
    "padded": {"max_length": 32},
    "packed": {"packing": True, "packing_strategy": "bfd", "max_length": 16},
}
CONFIGS = {
    "perft-r": lambda: PerftConfig(r=4, num_experts=4),
    "perft-e": lambda: PerftConfig(variant="E", r=4),
    "esft": lambda: EsftConfig(experts=EXPERTS),
    "esft-routers": lambda: EsftConfig(experts=EXPERTS, train_router=True),
    "esft-lora": lambda: EsftConfig(experts=EXPERTS, expert_adapter="lora", r=4),
    "mov": lambda: MovConfig(num_experts=4),
}
CASES = [(form, method) for form in FORMS for method in CONFIGS]
LOGGED = {"moe/load_entropy", "moe/max_over_mean_load", "moe/dead_experts"}


def rows() -> Dataset:
    """Documents of one short cycle of words, which a model can learn."""
    return Dataset.from_list([{"input_ids": [3 + (row + i) % 5 for i in range(n)]} for row, n in enumerate(LENGTHS)])


def trainer_of(method: str, form: str, folder, **model_fields) -> SFTTrainer:
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=True,
        disable_tqdm=True,
        **FORMS[form],
    )
    config = CONFIGS[method]()
    config.task_type = "CAUSAL_LM"
    trainer = SFTTrainer(
        model=sparse_model("olmoe", attn_implementation="sdpa", **model_fields),
        args=args,
        train_dataset=rows(),
        processing_class=tokenizer(),
        peft_config=config,
    )
    attach(trainer)
    return trainer


@pytest.mark.filterwarnings("ignore:.*packing.*")
@pytest.mark.parametrize(("form", "method"), sliced(CASES, diagonal(CASES, 0, every=2)))
def test_training_logs_and_saves(method, form, tmp_path):
    trainer = trainer_of(method, form, tmp_path)
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in logged]
    assert len(losses) == 6 and sum(losses[-2:]) < sum(losses[:2]) - (0.05 if method == "mov" else 0.2), losses
    assert all(entry.keys() >= LOGGED for entry in logged)
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)
    trainer.save_model(str(tmp_path))
    model, plain, batch = trainer.model.eval(), sparse_model("olmoe", attn_implementation="sdpa"), token_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        with model.disable_adapter():
            off = model(**batch).logits
        torch.testing.assert_close(off, plain(**batch).logits)
        found = PeftModel.from_pretrained(plain, tmp_path).eval()(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, off, atol=1e-3)


@pytest.mark.parametrize("expert_adapter", ["full", "lora"])
def test_a_checkpoint_resumes_into_the_experts_it_trained_and_no_others(expert_adapter, tmp_path, monkeypatch):
    # As many experts of each layer, so that every tensor fits.
    for experts, refused in ((EXPERTS, False), ({"0": [1, 3, 7], "1": [2]}, True), (EXPERTS, False)):
        config = EsftConfig(experts=experts, expert_adapter=expert_adapter)
        monkeypatch.setitem(CONFIGS, "esft", lambda config=config: config)
        trainer = trainer_of("esft", "padded", tmp_path)
        trainer.args.save_strategy, trainer.args.save_steps, trainer.args.max_steps = "steps", 2, 4
        if not (tmp_path / "checkpoint-2").exists():
            trainer.train()
            continue
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        if refused:
            with pytest.raises(ValueError, match=r"weights of experts={'0': \[1, 3, 6\].*experts={'0': \[1, 3, 7\]"):
                trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
            with pytest.raises(ValueError, match="Nothing has been changed"):
                trainer.model.load_adapter(model_id=str(tmp_path / "checkpoint-2"), adapter_name="default")
            assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
        else:
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
            assert trainer.state.global_step == 4


def trained_routers(coef: float, folder) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The first step's log, and the routers after training under a balance loss of the backbone's own."""
    trainer = trainer_of("esft-routers", "padded", folder, output_router_logits=True, router_aux_loss_coef=coef)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return first, [p.detach() for n, p in trainer.model.named_parameters() if ".gate.modules_to_save." in n]


def test_the_backbones_own_balance_loss_reaches_the_routers_that_train(tmp_path):
    (log, routers), (_, other) = (trained_routers(coef, tmp_path) for coef in (0.5, 1e-6))
    # One per expert that a token uses when the load is even, as transformers counts.
    assert 2.9 < log["aux_loss"] < 8
    assert len(routers) == 2 and not any(torch.allclose(p, q, atol=1e-3) for p, q in zip(routers, other, strict=True))


@pytest.mark.filterwarnings("ignore:DPOTrainer compares passes")
@pytest.mark.parametrize("method", ["perft-r", "esft", "esft-routers"])
def test_preference_training_starts_from_a_reference_equal_to_the_policy(method, tmp_path):
    config = CONFIGS[method]()
    config.task_type = "CAUSAL_LM"
    fields = shared(tmp_path, 1, router_aux_loss_coef=0.0)
    trainer = DPOTrainer(
        model=sparse_model("olmoe"),
        args=DPOConfig(**{**fields, "learning_rate": 1e-2, "gradient_checkpointing": True}),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        peft_config=config,
    )
    attach(trainer)
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert abs(margins[0]) < 1e-5 < 1e-4 < abs(margins[-1])
