"""Elastic weight consolidation: squared gradients by hand, the gradient of the penalty, and an effect in training."""

from __future__ import annotations

import pytest
import torch

from moe_peft.integrations import EwcCallback, Fisher, attach, fisher_information
from tests.integrations.test_callback import adapted, rows
from tests.integrations.test_parameter_groups import trainer_of


def batches(count=3):
    for row in rows(count):
        ids = torch.tensor([row["input_ids"]])
        yield {"input_ids": ids, "labels": ids}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_importance_is_the_mean_squared_gradient_and_the_model_stays_as_it_was():
    model = adapted(coef=0.0).train()
    fisher = fisher_information(model, batches())
    assert model.training and all(p.grad is None for p in model.parameters())
    expected = [torch.zeros_like(p) for p in trained(model)]
    model.eval()
    for batch in batches():
        for total, grad in zip(expected, torch.autograd.grad(model(**batch).loss, trained(model)), strict=True):
            total += grad**2 / 3
    found = sorted(tensor.sum().item() for tensor in fisher.importance.values())
    assert found == pytest.approx(sorted(tensor.sum().item() for tensor in expected), rel=1e-4)
    assert all(p.shape in {v.shape for v in fisher.values.values()} for p in trained(model))


def test_the_step_gets_the_gradient_of_the_penalty():
    model = adapted(coef=0.0)
    callback = EwcCallback(fisher_information(model, batches()), weight=3.0)
    assert callback.penalty(model) == 0
    torch.manual_seed(0)
    for p in trained(model):
        p.data += 0.1 * torch.randn_like(p)
    expected = torch.autograd.grad(callback.penalty(model), trained(model))
    trained(model)[0].grad = torch.ones_like(trained(model)[0])
    callback.on_pre_optimizer_step(None, None, None, model=model)
    found = [p.grad for p in trained(model)]
    torch.testing.assert_close(found[0] - 1, expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1:], list(expected[1:]), rtol=1e-4, atol=1e-6)


def test_training_stays_nearer_to_where_it_was(tmp_path):
    distances = []
    for weight in (None, 1e2):
        model = adapted(coef=0.0)
        fisher = fisher_information(model, batches())
        trainer = attach(trainer_of(tmp_path, model, optim="sgd", learning_rate=1e-2, weight_decay=0.0))
        if weight is not None:
            trainer.add_callback(EwcCallback(fisher, weight))
        trainer.train()
        callback = EwcCallback(fisher, 1.0)
        distances.append(callback.penalty(model).item())
    assert distances[1] < distances[0]


def test_a_file_brings_it_back(tmp_path):
    fisher = fisher_information(adapted(), batches(1))
    fisher.save(tmp_path / "fisher.safetensors")
    again = Fisher.load(tmp_path / "fisher.safetensors")
    for own, other in ((fisher.importance, again.importance), (fisher.values, again.values)):
        assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def test_what_was_measured_on_other_adapters_and_settings_that_shard_or_scale_are_refused(tmp_path):
    fisher = fisher_information(adapted(r=3), batches(1))
    trainer = trainer_of(tmp_path)
    trainer.add_callback(EwcCallback(fisher, 1.0))
    with pytest.raises(ValueError, match="are not those that were measured"):
        trainer.train()
    for weight in (0.0, -1.0, "1"):
        with pytest.raises(ValueError, match="must be a positive number"):
            EwcCallback(fisher, weight)
    with pytest.raises(ValueError, match="batches is empty"):
        fisher_information(adapted(), [])


@pytest.mark.parametrize(
    ("importance", "values", "message"),
    [
        ({"w": torch.tensor([float("nan")])}, {"w": torch.ones(1)}, "importance holds NaN, .*'w'"),
        ({"w": torch.tensor([-1.0])}, {"w": torch.ones(1)}, "importance holds .*negative numbers of .*'w'"),
        ({"w": torch.ones(1)}, {"w": torch.tensor([float("inf")])}, "values holds NaN or infinite numbers of .*'w'"),
        ({"w": torch.ones(1)}, {"v": torch.ones(1)}, "the same parameters; .*'v', 'w'"),
        ({"w": torch.ones(1)}, {"w": torch.ones(2)}, "the same parameters; .*'w'"),
        ({"w": 1.0}, {"w": torch.ones(1)}, "must be tensors"),
        (None, {"w": torch.ones(1)}, "must be dicts"),
    ],
)
def test_what_would_lose_the_weights_is_no_fisher_information(importance, values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Fisher(importance, values)


@pytest.mark.parametrize("weight", [0, True, "1", None, float("nan"), float("inf"), 10**400])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    with pytest.raises(ValueError, match=r"weight=.* must be a positive number"):
        EwcCallback(Fisher({}, {}), weight)


def test_a_loss_that_is_not_finite_measures_nothing_and_a_damaged_file_is_none(tmp_path):
    model = adapted(coef=0.0)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="the loss of batch 0 is nan: its labels are all masked"):
        fisher_information(model, [{"input_ids": ids, "labels": torch.full_like(ids, -100)}])
    (tmp_path / "fisher.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"is no file of Fisher\.save, or damaged"):
        Fisher.load(tmp_path / "fisher.safetensors")
