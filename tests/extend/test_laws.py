"""Laws of whole models with whatever is registered: every part in each run, every pair of parts in the slow one."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from moe_peft import routed_layers, router_loss
from moe_peft.extend import EXPERTS, GATES, LOSSES, ROUTERS, SCORERS, SELECTORS
from tests.contract.cases import MODELS

from .cases import PARTS, batch_for, close, make, on_models, parts_of, promised, rows_of, with_groups
from .combinations import losses_for, placed

ROUNDING = 1e-9


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_all_registered_parts_and_losses_take_part():
    for position, registry in enumerate((ROUTERS, SCORERS, GATES, EXPERTS)):
        assert set(registry) <= {choice[position] for choice in (*PARTS, *placed())}
    assert set(SELECTORS) <= {choice[0] for choice in PARTS}
    assert set(LOSSES) <= {name for choice in PARTS for name in losses_for(choice)}


@on_models(0)
def test_the_adapted_model_starts_as_the_base_bit_for_bit(place, choice):
    model, batch = make(place, choice, random=False), batch_for(place, choice)
    found = logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(found, logits(model, batch)), "the tensors in `up` start at zero and add exactly nothing"


@on_models(1)
def test_every_tensor_that_trains_gets_a_gradient_under_either_kind_of_checkpointing(place, choice):
    model, batch = make(place, choice, train=True), batch_for(place, choice, labels=True)
    results = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        torch.manual_seed(2)
        loss = model(**batch).loss
        loss.backward()
        total = float(router_loss(model).detach())
        results.append([loss.detach(), *(p.grad for part in parts_of(model) for p in part.parameters())])
        for part in parts_of(model):
            for name, parameter in part.named_parameters():
                kind, trains = type(part).__name__, name not in part.frozen
                assert parameter.requires_grad == trains, f"{kind}.{name}: `frozen` names the tensors that never train"
                assert (parameter.grad is not None) == trains, f"{kind}.{name} has no gradient: nothing depends on it"
                assert parameter.grad is None or torch.isfinite(parameter.grad).all(), f"{kind}.{name}"
        assert total == total and (total == 0) == (not losses_for(choice))
        if reentrant is not None:
            advice = f"recomputation (use_reentrant={reentrant}) decides otherwise: keep no state between calls"
            torch.testing.assert_close(
                results[-1], results[0], rtol=1e-9, atol=1e-12, msg=lambda text, advice=advice: f"{advice}\n{text}"
            )
    names = {name for layer in routed_layers(model) for name in layer.objectives["default"].losses}
    assert names == set(losses_for(choice))


@on_models(2)
def test_later_tokens_and_other_rows_change_nothing_where_the_parts_say_so(place, choice):
    model, batch = make(place, choice), batch_for(place, choice)
    before = logits(model, batch)
    if promised(choice, "causal"):
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][:, 5:] = (changed["input_ids"][:, 5:] + 1) % 60 + 3
        close(
            logits(model, changed)[:, :5], before[:, :5], "a later token changes an earlier one: causal=False", 1e-12
        )
    if promised(choice, "batch_invariant"):
        advice = "other rows of the batch, or padding, change a row: batch_invariant=False"
        close(logits(model, rows_of(batch, 0)), before[:1], advice, ROUNDING)
        short = {key: value[:, :6] if value.dim() == 2 else value for key, value in rows_of(batch, 1).items()}
        alone = logits(model, short)[0]
        close(before[1, :6], alone, f"{advice} (padding on the right)", ROUNDING)
        left = {key: value.roll(3, 1) if value.dim() == 2 else value for key, value in rows_of(batch, 1).items()}
        left = {key: torch.cat([value, rows_of(batch, 0)[key]]) for key, value in left.items()}
        left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)
        close(logits(model, left)[0, 3:], alone, f"{advice} (padding on the left)", ROUNDING)


@on_models(3)
def test_decoding_with_a_cache_equals_the_full_forward_where_the_parts_say_so(place, choice):
    if not promised(choice, "decode_stateless"):
        pytest.skip("makes no such promise")
    model, batch = make(place, choice), rows_of(batch_for(place, choice), 0)
    given = {key: value for key, value in batch.items() if key not in ("input_ids", "attention_mask")}
    ids, cache, steps = batch["input_ids"], None, []
    whole = logits(model, {"input_ids": ids, **given})
    with torch.no_grad():
        for position in range(ids.shape[1]):
            one = {
                key: value[:, position : position + 1] if value.dim() == 2 else value for key, value in given.items()
            }
            out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True, **one)
            cache = out.past_key_values
            steps.append(out.logits)
    close(torch.cat(steps, 1), whole, "a decision depends on tokens before it: decode_stateless=False", ROUNDING)


@on_models(4)
def test_beams_with_a_cache_equal_beams_without_where_the_parts_say_so(place, choice):
    if not promised(choice, "decode_stateless", "batch_invariant"):
        pytest.skip("makes no such promise")
    model, batch = make(place, choice), rows_of(batch_for(place, choice), 0, 1)
    batch = {key: value[:, :5] for key, value in batch.items() if value.dim() == 2 and key != "labels"}
    settings = {"num_beams": 2, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with with_groups(model, choice, 0, 1), torch.no_grad():
        found = [model.generate(**batch, **settings, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*found), "beams repeat and reorder rows: nothing may be kept by the number of a row"


@on_models(5)
def test_a_saved_adapter_loads_bit_for_bit(place, choice, tmp_path):
    model, batch = make(place, choice, dtype=torch.float32), batch_for(place, choice)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MODELS[place].build(), tmp_path).eval()
    own = {key: tensor for key, tensor in model.state_dict().items() if ".routed_" in key}
    found = {key: tensor for key, tensor in again.state_dict().items() if ".routed_" in key}
    assert own.keys() == found.keys() and all(torch.equal(own[key], found[key]) for key in own)
    advice = "the loaded adapter computes something else: what is no tensor must follow from fields and options"
    assert torch.equal(logits(again, batch), logits(model, batch)), advice


@on_models(6)
def test_rows_with_adapter_names_equal_those_of_the_adapter_alone(place, choice):
    model, batch = make(place, choice), batch_for(place, choice)
    names = ["default", "__base__", "default"]
    with torch.no_grad():
        mixed, own = model(**batch, adapter_names=names).logits, model(**batch).logits
        with model.disable_adapter():
            base = model(**batch).logits
    advice = "rows of one adapter decide otherwise than in a batch of their own: read the context's rows"
    close(mixed, torch.stack([own[0], base[1], own[2]]), advice, ROUNDING)
