"""The same documents padded, padding-free and packed, as SFTTrainer batches them: same losses, same statistics."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch.optim import SGD
from trl import SFTConfig, SFTTrainer

from moe_peft import LoraMoeConfig, RoutedConfig, attach, telemetry
from moe_peft.forward.objective import router_loss_values
from moe_peft.telemetry.meter import RoutingMeter, metrics_of
from tests.contract.cases import randomize
from tests.integrations.trainers import tokenizer
from tests.tiny import tiny_llama

LENGTHS = [7, 3, 5, 4, 9, 4]
# Packing joins the rows of the data set, so that a row has no single group.
NO_GROUP = ("groups", "packed")
FORMS = {
    "padded": {"max_length": 32},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "packing_strategy": "bfd", "max_length": 32},
}
CONFIGS = {
    "top_k": lambda: RoutedConfig(num_experts=4, router_aux_loss_coef=1.0, router_z_loss_coef=1.0),
    "dense": lambda: RoutedConfig(num_experts=4, router="dense", router_aux_loss_coef=1.0, router_z_loss_coef=1.0),
    "localized": lambda: LoraMoeConfig(num_experts=4, lora_dropout=0.0),
    "groups": lambda: LoraMoeConfig(
        num_experts=4, lora_dropout=0.0, expert_groups=[0, 0, 1, 1], localized_balancing_delta=0.4
    ),
}

CASES = [(method, form) for method in CONFIGS for form in ("padding-free", "packed") if (method, form) != NO_GROUP]


def batch_of(form: str, config, folder):
    """The trainer and the one batch that holds all documents."""
    config.task_type = "CAUSAL_LM"
    generator = torch.Generator().manual_seed(2)
    rows = [{"input_ids": torch.randint(3, 60, (length,), generator=generator).tolist()} for length in LENGTHS]
    grouped = getattr(config, "expert_groups", None) is not None
    if grouped:
        rows = [{**row, "task_type": number % 2} for number, row in enumerate(rows)]
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(LENGTHS),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=not grouped,
        **FORMS[form],
    )
    model = tiny_llama(attn_implementation="sdpa")
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=config,
    )
    randomize(trainer.model)
    attach(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    batch.pop("labels")
    return trainer.model, batch


def measured(form, config, folder):
    model, batch = batch_of(form, config, folder)
    model.train()
    with telemetry.record(model) as routings:
        model(**batch, use_cache=False)
    meter = RoutingMeter()
    for place, made in routings.items():
        for routing in made:
            meter.observe(place, "default", routing)
    losses = {name: float(value) for name, value in router_loss_values(model).items()}
    return batch, losses, metrics_of(meter.read(), 2)


@pytest.mark.filterwarnings("ignore:.*padding-free.*", "ignore:.*packing.*")
@pytest.mark.parametrize(("method", "form"), CASES)
def test_losses_and_statistics_do_not_depend_on_the_form_of_the_batch(method, form, tmp_path):
    padded, losses, metrics = measured("padded", CONFIGS[method](), tmp_path)
    batch, again, metrics_again = measured(form, CONFIGS[method](), tmp_path)
    assert padded["input_ids"].shape == (len(LENGTHS), max(LENGTHS))
    assert batch["input_ids"].numel() == sum(LENGTHS) and "attention_mask" not in batch
    assert again == pytest.approx(losses, rel=1e-5)
    assert metrics_again == pytest.approx(metrics, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*packing.*")
def test_packed_rows_have_no_single_group_and_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"a row has no single group|no column 'task_type'"):
        batch_of("packed", CONFIGS["groups"](), tmp_path)


def test_padding_free_rows_train_in_a_plain_loop(tmp_path):
    model, batch = batch_of("padding-free", CONFIGS["top_k"](), tmp_path)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "_router." in n}
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
