"""A selection is the smallest prefix of each layer that reaches p, known in advance where the routing is."""

from __future__ import annotations

import json
import math

import pytest
import torch

from moe_peft import EsftConfig, ExpertScores, describe, score_experts, select_experts
from moe_peft.selection.scores import LayerScores
from tests.scored_models import olmoe
from tests.tiny import padded_batch


def scores_of(*layers, criterion="token", aggregate="token"):
    """Scores of one kind, the first layer being number 1."""
    return ExpertScores(
        {
            index: LayerScores({(criterion, aggregate): torch.tensor(layer, dtype=torch.float64)})
            for index, layer in enumerate(layers, 1)
        }
    )


def random_scores(seed, criterion):
    """Several layers of E experts, some unused, some with equal scores; gate scores of any sum."""
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(2, 40, (), generator=generator))
    counts = torch.randint(0, 8, (5, size), generator=generator).double()
    counts[:, 0] += 1
    scores = counts / counts.sum(1, keepdim=True)
    if criterion == "gate":
        scores = scores * (0.1 + 2.5 * torch.rand(5, 1, generator=generator, dtype=torch.float64))
    return scores_of(*scores.tolist(), criterion=criterion)


@pytest.mark.parametrize("criterion", ["token", "gate"])
@pytest.mark.parametrize("seed", range(40))
def test_a_selection_is_the_smallest_prefix_that_reaches_p(seed, criterion):
    scores = random_scores(seed, criterion)
    for p in (1e-6, 0.05, 0.2, 0.5, 0.8, 0.99):
        for normalize in (False, True):
            selection = select_experts(scores, p, criterion=criterion, normalize_scores=normalize)
            for layer in scores.layers:
                own, ids = scores.of(layer, criterion), selection.experts[str(layer)]
                own = own / own.sum() if normalize else own
                order = sorted(range(len(own)), key=lambda e: (-float(own[e]), e))
                assert ids == order[: len(ids)] and len(ids) > 0
                reached = float(own[ids].sum())
                if reached < p - 1e-8:
                    # The whole layer does not reach p: every used expert is taken.
                    assert len(ids) == int((own > 0).sum())
                else:
                    assert float(own[ids[:-1]].sum()) < p


@pytest.mark.parametrize("seed", range(10))
def test_p_0_selects_none_a_small_p_the_best_and_p_1_every_used_expert(seed):
    scores = random_scores(seed, "token")
    assert select_experts(scores, 0).num_selected == 0
    assert select_experts(scores, 1e-12).experts == {
        str(layer): [int(scores.of(layer).argmax())] for layer in scores.layers
    }
    for p in (1, 1 + 1e-12, 3):
        everything = select_experts(scores, p)
        for layer in scores.layers:
            assert set(everything.experts[str(layer)]) == set(scores.of(layer).nonzero().flatten().tolist())


def test_scores_that_a_file_rounded_up_do_not_end_p_1_early():
    assert select_experts(scores_of([0.5002, 0.4999, 0.0001, 0.0]), 1.0).experts == {"1": [0, 1, 2]}
    assert select_experts(scores_of([1.5, 0.75, 0.25], criterion="gate"), 1.0, criterion="gate").counts == {"1": 1}


def test_ties_are_broken_by_the_smaller_id_whatever_the_order_of_summation():
    third = 0.1 + 0.2
    assert third != 0.3
    for layer in ([0.3, third, 0.1, 0.3], [third, 0.3, 0.1, 0.3], [0.3, 0.3, 0.1, third]):
        assert select_experts(scores_of(layer), 0.6).experts == {"1": [0, 1]}
    assert select_experts(scores_of([0.0, 0.25, 0.25, 0.25, 0.25]), 0.7).experts == {"1": [1, 2, 3]}


@pytest.mark.parametrize("k", range(2, 9))
def test_equal_winners_are_selected_up_to_the_ceiling_of_p_times_k(k):
    scores = scores_of([1 / k] * k + [0.0])
    for step in range(1, 10 * k + 1):
        p = step / (10 * k)
        assert select_experts(scores, p).counts == {"1": math.ceil(round(p * k, 9))}, p


def test_a_router_that_sends_all_tokens_to_known_experts_selects_those():
    model = olmoe(num_experts_per_tok=3)
    model.model.embed_tokens.weight.data[:, 0] = 50.0
    winners = {0: [5, 0, 2], 1: [1, 4, 3]}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate.weight.data.zero_()
        layer.mlp.gate.weight.data[winners[index], 0] = torch.tensor([0.6, 0.5, 0.3], dtype=torch.float64)
    scores = score_experts(model, [padded_batch([6, 2])], show_progress=False)
    for p, count in ((0.2, 1), (1 / 3, 1), (0.34, 2), (2 / 3, 2), (0.7, 3), (1.0, 3)):
        # Each wins one slot of three, so the smaller id comes first.
        assert select_experts(scores, p).experts == {str(i): sorted(ids)[:count] for i, ids in winners.items()}
    # By weight the order is that of the router.
    by_weight = select_experts(scores, 9.0, criterion="gate")
    assert by_weight.experts == {str(i): ids for i, ids in winners.items()}


# Scores in the published shape: rounded to four digits, layer 0 dense, layers as the file sorts them.
PUBLISHED = {
    "1": [0.0101, 0.0912, 0.0653, 0.1402, 0.3021, 0.0653, 0.2154, 0.1104],
    "10": [0.1250, 0.1249, 0.1251, 0.1250, 0.1250, 0.1250, 0.1250, 0.1250],
    "2": [0.0000, 0.7401, 0.0500, 0.0499, 0.0000, 0.1400, 0.0000, 0.0200],
}
# What the rule per layer gives for p = 0.4; dividing by the sum over layers first would give other experts.
CONFIGURATION = {"1": [4, 6], "2": [1], "10": [2, 0, 3, 4]}


def test_a_summary_of_the_published_shape_gives_its_configuration(tmp_path):
    numbered = {layer: {str(e): score for e, score in enumerate(row)} for layer, row in PUBLISHED.items()}
    content = {"token_scores": numbered, "gate_scores": numbered}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    scores = ExpertScores.load(tmp_path / "summary.json")
    selection = select_experts(scores, 0.4)
    assert selection.experts == CONFIGURATION and list(selection.experts) == ["1", "2", "10"]
    selection.save(tmp_path / "intent.json")
    assert json.loads((tmp_path / "intent.json").read_text()) == {
        "experts": CONFIGURATION,
        "shared_experts": False,
        "non_expert_modules": False,
        "num_experts": {"1": 8, "2": 8, "10": 8},
    }
    stacked = torch.tensor(list(PUBLISHED.values()), dtype=torch.float64)
    over_layers = scores_of(*(stacked / stacked.sum(0)).nan_to_num().tolist(), criterion="gate")
    assert list(select_experts(over_layers, 0.4, criterion="gate").experts.values()) != [
        CONFIGURATION[layer] for layer in PUBLISHED
    ]


def test_p_defaults_to_the_papers_and_aggregates_are_told_apart():
    for criterion, expected in (("token", [0, 1]), ("gate", [0])):
        scores = scores_of([0.15, 0.14, 0.71], criterion=criterion)
        assert select_experts(scores, criterion=criterion).experts == {"1": [2]}
        scores = scores_of([0.15, 0.14] + [0.071] * 10, criterion=criterion)
        assert select_experts(scores, criterion=criterion).experts == {"1": expected}
    scores = scores_of([0.1, 0.9], aggregate="sample")
    assert select_experts(scores, aggregate="sample").experts == {"1": [1]}
    with pytest.raises(ValueError, match="aggregate='token'"):
        select_experts(scores)


def test_normalized_scores_make_p_a_share_of_the_layer():
    scores = scores_of([0.05, 0.04, 0.03, 0.08], criterion="gate")
    assert select_experts(scores, 0.1, criterion="gate").experts == {"1": [3, 0]}
    assert select_experts(scores, 0.1, criterion="gate", normalize_scores=True).experts == {"1": [3]}
    scaled = scores_of([0.5, 0.4, 0.3, 0.8], criterion="gate")
    for p in (0.2, 0.5, 0.7, 0.95):
        own, other = (select_experts(s, p, criterion="gate", normalize_scores=True) for s in (scores, scaled))
        assert own.experts == other.experts


def test_a_minimum_takes_the_next_experts_in_order():
    scores = scores_of([0.0, 0.7, 0.1, 0.2], [0.25] * 4)
    assert select_experts(scores, 0, min_experts=2).experts == {"1": [1, 3], "2": [0, 1]}
    assert select_experts(scores, 0.7, min_experts=2).experts == {"1": [1, 3], "2": [0, 1, 2]}
    assert select_experts(scores, 0, min_experts=4).experts == {"1": [1, 3, 2, 0], "2": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": -0.1}, "p=-0.1 must be 0 or more"),
        ({"p": math.nan}, "p=nan must be 0 or more"),
        ({"p": "0.2"}, "p='0.2' must be 0 or more, as in p=0.2"),
        ({"criterion": "load"}, "criterion='load' must be one of"),
        ({"aggregate": "layer"}, "aggregate='layer' must be one of"),
        ({"min_experts": 3}, "min_experts=3 must be between 0 and 2"),
        ({"min_experts": 1.0}, "min_experts=1.0 must be between 0 and 2, a whole number"),
        ({"min_experts": True}, "min_experts=True must be between 0 and 2"),
        ({"p": 10**400}, "p=<an integer of 1329 bits> must be 0 or more"),
        ({"p": True}, "p=True must be 0 or more"),
        ({"criterion": ["token"]}, r"criterion=\['token'\] must be one of"),
        ({"normalize_scores": "false"}, "normalize_scores='false' must be True or False"),
    ],
)
def test_arguments_outside_their_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_experts(scores_of([0.5, 0.5]), **arguments)


def test_a_selection_goes_into_the_configuration_and_counts_what_it_trains():
    scores = score_experts(olmoe(), [padded_batch([9, 4])], show_progress=False)
    selection = select_experts(scores, 0.5)
    description = describe(olmoe(), EsftConfig(experts=selection.experts))
    assert description.num_parameters == selection.num_parameters == selection.num_selected * 3 * 16 * 32
    assert description.base_parameters == selection.model_parameters
    assert selection.share == selection.num_selected / 12
    assert sum(selection.counts.values()) == selection.num_selected


@pytest.mark.parametrize("scores", ["summary.json", None, {"token_scores": {}}])
def test_what_is_no_scores_says_where_they_come_from(scores):
    with pytest.raises(ValueError, match=r"scores=.* must be what moe_peft.score_experts returns, or moe_peft.Exp"):
        select_experts(scores)


def sized(*layers, parameters):
    kinds = (("token", "token"),)
    return ExpertScores(
        {
            index: LayerScores(
                {kind: torch.tensor(layer, dtype=torch.float64) for kind in kinds}, expert_parameters=own
            )
            for index, (layer, own) in enumerate(zip(layers, parameters, strict=True), 1)
        }
    )


@pytest.mark.parametrize("budget", [0, 9, 10, 25, 30, 60, 10**6])
def test_a_budget_takes_the_largest_p_that_selects_no_more_parameters(budget):
    scores = sized([0.5, 0.3, 0.2], [0.6, 0.3, 0.1], parameters=[10, 15])
    found = select_experts(scores, max_parameters=budget)
    assert found.num_parameters <= budget
    assert found == select_experts(scores, found.rule.p)
    more = [select_experts(scores, p / 1000) for p in range(1001)]
    assert found.num_parameters == max(own.num_parameters for own in more if own.num_parameters <= budget)
    shrunk = select_experts(scores, max_parameters=max(budget - 10, 0))
    assert all(set(shrunk.experts[layer]) <= set(ids) for layer, ids in found.experts.items())


def test_a_budget_that_cannot_be_kept_or_measured_is_refused():
    scores = sized([0.5, 0.5], parameters=[10])
    for given, message in (
        ({"max_parameters": 5, "min_experts": 1}, "below the 10 of min_experts=1"),
        ({"max_parameters": 5, "p": 0.2}, "exclude each other"),
        ({"max_parameters": -1}, "whole number"),
        ({"max_parameters": True}, "whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            select_experts(scores, **given)
    with pytest.raises(ValueError, match="how large an expert is"):
        select_experts(scores_of([0.5, 0.5]), max_parameters=5)
