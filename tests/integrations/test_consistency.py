"""Two passes that must agree: the loss by its formula, in plain and TRL trainers, and over accumulated batches."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from moe_peft import RoutedConfig, attach, routed_layers
from moe_peft.integrations import consistent, consistent_loss, twice
from moe_peft.integrations.consistency import ConsistentLoss, DoublingCollator
from tests.compare import assert_same
from tests.tiny import padded_batch, tiny_llama

from .trainers import collate, shared, token_rows, tokenizer

WEIGHT = 0.7
RANDOM = {"router": "random", "num_experts": 4, "r": 2, "init_weights": False, "task_type": "CAUSAL_LM"}


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("num_items", [None, 20])
@pytest.mark.parametrize("next_tokens", [True, False])
def test_the_loss_equals_the_formula(next_tokens, num_items):
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 5, 6).double().requires_grad_(), torch.randint(6, (2, 5))
    labels[0, :2] = labels[1, 4:] = -100
    p, terms, count = logits.softmax(-1), [], 0
    for row in range(2):
        for position in range(5):
            label, before = int(labels[row, position]), position - 1 if next_tokens else position
            if label != -100 and before >= 0:
                one, other = p[row, before], p[row + 2, before]
                both = -(one[label].log() + other[label].log()) / 2
                terms.append(both + WEIGHT * (kl(one, other) + kl(other, one)) / 2)
                count += 1
    expected = sum(terms) / (count if num_items is None else num_items / 2)
    given = {"next_tokens": next_tokens, "num_items": num_items}
    found = consistent_loss(logits, torch.cat([labels, labels]), WEIGHT, **given)
    assert_same(found, expected, [logits], [logits], 1e-10)


def test_classes_of_rows_are_compared_as_well_and_equal_passes_cost_their_cross_entropy():
    logits, labels = torch.randn(3, 4), torch.tensor([1, 0, 3])
    found = consistent_loss(torch.cat([logits, logits]), torch.cat([labels, labels]), 5.0, next_tokens=False)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels))


class Gradients(TrainerCallback):
    """The gradients of the first optimizer step."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            self.first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trainer_of(kind: str, folder, model, accumulation: int = 1):
    settings = shared(folder, accumulation, max_steps=1, eval_strategy="steps", eval_steps=1)
    data, gradients = token_rows(), Gradients()
    if kind == "plain":
        args = TrainingArguments(**settings)
        made = Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, data_collator=collate)
    else:
        args = SFTConfig(**settings)
        given = {"train_dataset": data, "eval_dataset": data, "processing_class": tokenizer()}
        made = SFTTrainer(model=model, args=args, **given)
    made.add_callback(gradients)
    return made, gradients


def read(model) -> list[tuple[dict, torch.Tensor, torch.Tensor]]:
    """Ids and labels-free arguments, the state of the generator and the decision of the first layer, of each pass."""
    seen = []
    (first, *_) = routed_layers(model)

    def enter(module, args, kwargs):
        if torch.is_grad_enabled():
            ids = {key: kwargs[key] for key in ("input_ids", "attention_mask") if key in kwargs}
            seen.append([ids, torch.get_rng_state(), None])
        elif not module.training:  # TRL measures its metrics by a pass of its own
            assert len(kwargs["input_ids"].unique(dim=0)) == len(kwargs["input_ids"]), "evaluation has each row once"

    def decide(module, args, routing):
        if routing.context.training:
            seen[-1][2] = routing.weights

    model.register_forward_pre_hook(enter, with_kwargs=True)
    first.router["default"].register_forward_hook(decide)
    return seen


@pytest.mark.parametrize(("kind", "accumulation"), [("plain", 2), ("sft", 1)])
def test_a_trainers_step_is_that_of_the_loss_on_rows_that_draw_for_themselves(kind, accumulation, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), RoutedConfig(**RANDOM))
    trainer, gradients = trainer_of(kind, tmp_path, model, accumulation)
    trainer, seen = attach(consistent(trainer, WEIGHT)), read(model)
    trainer.train()
    model.zero_grad()
    passes, total = seen[:accumulation], 0.0
    labels = [ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100) for ids, *_ in passes]
    count = sum(int((own[:, 1:] != -100).sum()) for own in labels)
    for (ids, state, weights), own in zip(passes, labels, strict=True):
        first, second = weights.chunk(2)
        assert not torch.equal(first, second) and torch.equal(*ids["input_ids"].chunk(2))
        torch.set_rng_state(state)
        total = consistent_loss(model.train()(**ids).logits, own, WEIGHT, num_items=count)
        total.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.first.keys() and total > 0
    for name, grad in found.items():
        torch.testing.assert_close(gradients.first[name], grad, rtol=1e-4, atol=1e-7)


def test_what_cannot_be_compared_is_refused_by_name(tmp_path):
    model = get_peft_model(tiny_llama(), RoutedConfig(**RANDOM, router_args={"draw_for": "batch"}))
    trainer, _ = trainer_of("plain", tmp_path, model)
    with pytest.raises(ValueError, match="draws once for all rows"):
        consistent(trainer)
    assert trainer.compute_loss_func is None
    trainer, _ = trainer_of("plain", tmp_path, get_peft_model(tiny_llama(), RoutedConfig(**RANDOM)))
    for weight in (0, -1.0, float("nan"), True, "1"):
        with pytest.raises(ValueError, match=r"weight=.* must be a positive number"):
            consistent(trainer, weight)
    with pytest.raises(ValueError, match="no trainer"):
        consistent(model)
    trainer.args.packing = True
    with pytest.raises(ValueError, match="packed"):
        consistent(trainer)
    del trainer.args.packing
    with pytest.raises(ValueError, match="would be lost"):
        consistent(consistent(trainer))
    logits, labels = torch.randn(3, 4, 5), torch.ones(3, 4, dtype=torch.long)
    for rows in (3, 2):
        with pytest.raises(ValueError, match="rows of the batch are not each"):
            consistent_loss(logits[:rows], torch.tensor([[1], [2], [3]])[:rows].expand(rows, 4))
    with pytest.raises(ValueError, match="one class"):
        consistent_loss(logits[:2, :, :1], labels[:2])
    with pytest.raises(ValueError, match="no logits"):
        ConsistentLoss(1.0, True)({"loss": 1.0}, labels)


def test_rows_of_a_batch_stand_in_it_twice_in_the_same_order():
    batch = twice({**padded_batch([4, 2]), "use_cache": False})
    assert torch.equal(*batch["input_ids"].chunk(2)) and batch["use_cache"] is False
    assert DoublingCollator(list)([{"a": 1}, {"a": 2}]) == [{"a": 1}, {"a": 2}, {"a": 1}, {"a": 2}]
