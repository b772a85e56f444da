"""`output_router_logits` of a wrapped model are recorded once for each router."""

from __future__ import annotations

from peft import get_peft_model

from moe_peft import LoraMoeConfig, PerftConfig
from tests.backbones.cases import batch_for
from tests.backbones.models import tiny_model
from tests.contract.cases import tiny_olmoe


def hooks_of(model) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_router_logits_that_were_recorded_before_are_not_recorded_twice():
    model = tiny_model("minimax").requires_grad_(False)
    batch = batch_for(model)
    before = len(model(**batch, output_router_logits=True).router_logits)
    adapted = get_peft_model(model, PerftConfig(task_type="CAUSAL_LM"))
    assert before > 0 and len(adapted(**batch, output_router_logits=True).router_logits) == before


def test_a_model_whose_routers_are_found_by_their_class_gets_no_hook_of_transformers():
    names = {}
    for config in (LoraMoeConfig(target_modules=["q_proj"]), PerftConfig(task_type="CAUSAL_LM")):
        names[type(config)] = hooks_of(get_peft_model(tiny_olmoe(), config))
    assert len(set(names.values())) == 1
