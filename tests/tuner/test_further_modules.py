"""What is trained beside an adapter is checked before anything is changed."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from moe_peft import EsftConfig, LoraMoeConfig, MovConfig, PerftConfig, RoutedConfig
from moe_peft.forward.tracker import find_tracker
from tests.contract.cases import tiny_olmoe
from tests.tiny import VOCAB, padded_batch, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

TOKENS = [
    ([VOCAB], f"token ids from 0 to {VOCAB - 1}, of which {VOCAB} is none"),
    ([-1], "of which -1 is none"),
    ([], "Write at least one, or None"),
    ([3, 3], "names a token twice"),
    ([1 << 70], "of which 1180591620717411303424 is none"),
    ({}, "names no layer"),
    ({"embed_tokens": [VOCAB]}, "of which 64 is none"),
    ({"embed_tokns": [1]}, r"no module of the model is called so. Nearest names: \['embed_tokens'\]"),
    ({"": [1]}, "no module of the model is called so"),
]
MODULES = [
    ([""], ValueError, "modules_to_save"),
    (["lm_haed"], ValueError, r"no module of the model is called so. Nearest names: \['lm_head'\]"),
    (["layers"], TypeError, "cannot be trained as a whole"),
]
CONFIGS = [
    lambda **kw: RoutedConfig(num_experts=2, r=2, **kw),
    lambda **kw: LoraMoeConfig(num_experts=2, r=2, target_modules=["q_proj"], **kw),
    lambda **kw: MovConfig(num_experts=2, **kw),
    lambda **kw: PerftConfig(num_experts=2, r=2, **kw),
]


def refused(model, config, error, message):
    before = {name: type(module) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        get_peft_model(model, config)
    assert before == {name: type(module) for name, module in model.named_modules()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert find_tracker(model) is None and not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize(("indices", "message"), TOKENS)
def test_tokens_that_do_not_exist_are_refused_before_anything_changes(indices, message):
    for build in CONFIGS:
        try:
            config = build(trainable_token_indices=indices)
        except (ValueError, TypeError) as error:
            assert "trainable_token_indices" in str(error)
            continue
        refused(tiny_llama(), config, ValueError, message)


@pytest.mark.parametrize(("names", "error", "message"), MODULES)
def test_modules_that_do_not_exist_or_cannot_be_trained_are_refused_before_anything_changes(names, error, message):
    for build in CONFIGS:
        refused(tiny_llama(), build(modules_to_save=names), error, message)
    if names != ["layers"]:
        refused(tiny_olmoe(), EsftConfig(experts={"0": [1]}, modules_to_save=names), error, message)


def test_a_reward_model_may_lack_the_language_models_head_that_trl_adds():
    """Where a chat template brings new tokens, whatever the task."""
    config = RoutedConfig(num_experts=2, modules_to_save=["lm_head"])
    refused(tiny_bert(), config, ValueError, "no module of the model")
    config.task_type = "SEQ_CLS"
    get_peft_model(tiny_bert(), config)


def test_a_layer_is_trained_in_full_or_for_some_tokens():
    config = RoutedConfig(num_experts=2, modules_to_save=["embed_tokens"], trainable_token_indices=[3])
    refused(tiny_llama(), config, ValueError, "Take one of the two")


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (tiny_llama, {"trainable_token_indices": [3, 5]}),
        (tiny_llama, {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5]}}),
        (tiny_llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (tiny_gpt2, {"trainable_token_indices": {"wte": [3]}}),
        (tiny_t5, {"modules_to_save": ["lm_head"]}),
        (tiny_bert, {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}),
    ],
)
def test_what_can_be_trained_is_trained_by_two_adapters(build, fields):
    model = get_peft_model(build(), RoutedConfig(num_experts=2, r=2, **fields))
    model.add_adapter("second", RoutedConfig(num_experts=2, r=2, **fields))
    model.set_adapter("second")
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "routed_" not in name]
    assert trained and all("second" in name for name in trained)
    batch = padded_batch([5, 4])
    out = (
        model(**batch, labels=batch["input_ids"])
        if build is not tiny_bert
        else model(**batch, labels=torch.zeros(2).long())
    )
    out.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained and "lm_head" not in name)
