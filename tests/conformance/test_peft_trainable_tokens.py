"""Rows of embeddings that are trained beside our adapters."""

import pytest

from .retarget import retarget
from .sources import load
from .stand_in import install, stand_ins

peft = load("test_trainable_tokens")
TOKENS = {"target_modules": "all-linear", "trainable_token_indices": {"embed_tokens": [0, 1, 3]}}
# Some of the tests name modules that the tiny models lack, of which we warn.
pytestmark = pytest.mark.filterwarnings("default::moe_peft.MoePeftWarning")


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    install(monkeypatch, peft, stand_ins(one_expert=True)[0].values[0])


def built(**fields):
    """A configuration of each type, with one expert, so that what merges can be merged."""
    return [pytest.param(row.values[0](**fields), id=row.id) for row in stand_ins(one_expert=True)]


def factories(build):
    """A function of each type that builds configurations as a factory of the test does."""
    return [pytest.param(build(row.values[0]), id=row.id) for row in stand_ins(one_expert=True)]


OF_TOKENS = factories(
    lambda make: lambda indices: make(target_modules="all-linear", trainable_token_indices={"embed_tokens": indices})
)

TestTrainableTokens = retarget(
    peft.TestTrainableTokens,
    inline={
        "test_combined_with_peft_method_usage": built(**TOKENS),
        "test_disable_adapters_with_merging": built(**TOKENS),
        "test_safe_merge_with_adapter": built(**TOKENS),
        "test_load_multiple_adapters": built(**TOKENS),
        "test_multiple_adapters_different_token_indices": OF_TOKENS,
        "test_multiple_adapters_overlapping_token_indices_merging": OF_TOKENS,
        "test_multiple_adapters_overlapping_token_indices_merging_sequentially": OF_TOKENS,
        "test_multiple_adapters_disjunct_token_indices_merging_sequentially": OF_TOKENS,
        "test_multiple_adapters_mixed_forward": factories(
            lambda make: (
                lambda targets, indices: make(
                    target_modules=targets, trainable_token_indices={"embed_tokens": indices}
                )
            )
        ),
        "test_combined_with_peft_raises_target_layer_not_found": [
            pytest.param(*row.values, "does-not-exist", id=row.id)
            for row in built(trainable_token_indices={"does-not-exist": [0, 1, 2]}, target_modules=["q_proj"])
        ],
        "test_no_embeddings_in_save_with_combined_usage": built(**TOKENS),
        "test_weight_tying_noop_when_model_is_untied": built(**TOKENS),
    },
)
