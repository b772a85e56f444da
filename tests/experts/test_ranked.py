"""What kinds of pairs share: where dropout acts, how a pair starts, and keywords that a kind hands on unread."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_peft.experts import EXPERTS
from moe_peft.experts.ranked import RankedExperts, start_pair
from moe_peft.types import TokenContext

TRAINING, EVALUATION = TokenContext(training=True), TokenContext()


class Plain(RankedExperts):
    """A kind that reads its input as it is."""


class Halving(RankedExperts):
    """A kind with a dropout of its own."""

    def drop(self, x, context):
        return x / 2 if self.drops(context) else x


def test_the_input_is_dropped_in_training_passes_alone_and_stays_the_same_tensor_otherwise():
    bank, x = Plain(num_experts=2, scaling=1.0, lora_dropout=1.0), torch.ones(3, 4)
    assert not bank.drop(x, TRAINING).any()
    assert bank.drop(x, EVALUATION) is x
    assert Plain(num_experts=2, scaling=1.0).drop(x, TRAINING) is x


def test_a_kind_that_drops_in_a_way_of_its_own_is_known_to_drop_without_a_probability():
    bank, x = Halving(num_experts=2, scaling=1.0), torch.ones(3, 4)
    assert bank.drops(TRAINING) and not bank.drops(EVALUATION)
    assert torch.equal(bank.drop(x, TRAINING), x / 2)


@pytest.mark.parametrize("shape", [(4, 16), (3, 4, 16)])
def test_a_pair_starts_as_the_identity_with_rows_in_the_bounds_of_a_linear_layer_of_its_own(shape):
    A, B = torch.full(shape, torch.nan), torch.full((*shape[:-1], 8), torch.nan)
    start_pair(A, B, True)
    assert not B.any() and 0.9 * 16**-0.5 < A.abs().max() <= 16**-0.5
    start_pair(A, B, "gaussian")
    assert not B.any() and 0.01 < A.std() < 0.03
    start_pair(A, B, False)
    assert 0.9 * 4**-0.5 < B.abs().max() <= 4**-0.5 and A.abs().max() <= 16**-0.5


@pytest.mark.parametrize("name", [name for name, kind in EXPERTS.items() if issubclass(kind, RankedExperts)])
def test_a_kind_takes_what_its_bases_take_without_naming_it(name):
    kind = EXPERTS[name]
    own = type("Own", (kind,), {})
    common = {"num_experts": 3, "r": 2} | ({"scaling": 0.5} if "scaling" in kind.fields else {})
    sizes = {"inner_features": 5} if kind.placement == "ffn" else {}
    bank = own(6, 6, **common, **sizes, lora_dropout=0.25, init_weights="gaussian")
    assert bank.lora_dropout.p == 0.25 and isinstance(bank.lora_dropout, nn.Dropout)
    assert bank.scaling == common.get("scaling", 1.0)
    assert bank.num_choices == 3 + kind.further_choices({option.name: option.default for option in kind.options})
    with pytest.raises(TypeError, match="unheard_of"):
        own(6, 6, **common, **sizes, unheard_of=1)


def test_a_kind_that_settles_an_argument_of_its_base_takes_no_other_value_for_it():
    for name, argument in (
        ("bottleneck", "scaling"),
        ("normed", "experts_implementation"),
        ("zero_computation", "shared"),
    ):
        with pytest.raises(TypeError, match=argument):
            EXPERTS[name](6, 6, num_experts=3, r=2, **{"scaling": 1.0, argument: 1})
