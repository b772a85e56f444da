"""Experts choose tokens: a loop over sequences and experts, even loads, and no use in causal models."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model

from moe_peft import RoutedConfig, routed_layers
from moe_peft.routers.expert_choice import ExpertChoice
from moe_peft.types import TokenContext
from tests.compare import assert_same
from tests.tiny import padded_batch, tiny_bert

from .made import E, linear

ROWS = ((6, 4), (5, 5), (7, 1))  # width and valid tokens


def packed() -> TokenContext:
    valid = torch.cat([torch.arange(width) < own for width, own in ROWS])
    owner = torch.cat([torch.full((width,), s) for s, (width, _) in enumerate(ROWS)])
    return TokenContext(valid=valid, sequences=owner, num_sequences=len(ROWS))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("factor", [None, 0.5, 4.0])
def test_each_expert_takes_its_best_tokens_of_each_sequence(factor, training):
    known = packed()
    router, x = linear(ExpertChoice(capacity_factor=factor), num_tokens=len(known.valid))
    probs = (x @ router.weight.T).softmax(-1)
    expected = torch.zeros_like(probs)
    for s in range(known.num_sequences):
        own = [t for t in range(len(x)) if known.sequences[t] == s and known.valid[t]]
        count = max(1, math.ceil((2.0 if factor is None else factor) * len(own) / E))
        for e in range(E):
            for t in sorted(own, key=lambda t: -probs[t, e].item())[:count]:
                expected[t, e] = probs[t, e]
    found = router(x, TokenContext(**{**known.__dict__, "training": training}))
    assert_same(found.gate_matrix(), expected, [x, router.weight], [x, router.weight])


def test_loads_are_even_whatever_the_router_prefers():
    router, x = linear(ExpertChoice(capacity_factor=1.0), num_tokens=12)
    router.weight.data[0] *= 50
    assert router(x, TokenContext()).request_matrix().sum(0).tolist() == [3] * E


def test_equal_scores_are_served_in_the_order_of_the_tokens():
    router, x = linear(ExpertChoice(capacity_factor=1.0), num_tokens=8)
    router.weight.data.zero_()
    assert router(x, TokenContext()).request_matrix()[:2].all() and not router(x, TokenContext()).weights[2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_of_one_score_are_equal_whatever_a_vectorised_gate_makes_of_them(dtype):
    generator, differed = torch.Generator().manual_seed(0), False
    for count in [3, 5, 7, 11, 13, 23] * 30:
        z_TE = torch.randn(3, generator=generator, dtype=dtype).expand(count, 3).contiguous()
        probs_TE = z_TE.sigmoid()
        differed |= bool((probs_TE != probs_TE[:1]).any())
        taken_TE = ExpertChoice(capacity_factor=0.5)(z_TE, probs_TE, TokenContext(), 3).request_matrix().bool()
        places = max(1, math.ceil(count / 6))
        assert taken_TE[:places].all() and not taken_TE[places:].any()
    assert differed, "no gate of this machine differs between equal tokens: other numbers are needed"


def test_it_is_for_encoders_and_refused_for_causal_models():
    with pytest.raises(ValueError, match=r"causal language model, or allow_non_causal=True: with ExpertChoice"):
        RoutedConfig(router="expert_choice", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_bert(), RoutedConfig(router="expert_choice", task_type="SEQ_CLS", num_experts=4))
    batch = padded_batch([9, 5])
    with torch.no_grad():
        both = model.eval()(**batch).logits
        alone = model(**{key: value[1:, :5] for key, value in batch.items()}).logits
    torch.testing.assert_close(both[1:], alone)
    assert type(routed_layers(model)[0].router["default"].select) is ExpertChoice


def test_slices_of_rows_are_refused():
    router, x = linear(ExpertChoice())
    with pytest.raises(ValueError, match="slices of the rows"):
        router(x, TokenContext(part=4))
