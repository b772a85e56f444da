"""What papers promise of parts holds over three seeds, at the sizes of the page's table."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parents[2] / "benchmarks"
STEPS = 200
every_seed = pytest.mark.parametrize("seed", [0, 1, 2])


@pytest.fixture
def promises(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import promises

    return promises


@every_seed
@pytest.mark.parametrize(("num_experts", "num_null"), [(4, 3), (8, 8)])
def test_the_share_of_nulls_follows_their_number(promises, seed, num_experts, num_null):
    share = promises.null_share(seed, STEPS, num_experts, num_null)
    assert abs(share - num_null / (num_experts + num_null)) < 0.1


@every_seed
@pytest.mark.parametrize("active", [2, 3])
def test_relu_gates_reach_the_wanted_number_and_the_weight_stays_in_its_bounds(promises, seed, active):
    used, least, largest = promises.active_experts(seed, STEPS, active)
    assert abs(used - active) < 0.5
    assert 1e-8 <= least <= largest <= 1


@every_seed
def test_a_bias_evens_out_the_load_and_changes_no_weight(promises, seed):
    (without, _), (balanced, own_weights) = (
        promises.unevenness(seed, STEPS, router) for router in ("top_k", "bias_balanced")
    )
    assert balanced < without and own_weights


@every_seed
def test_top_p_spends_more_experts_on_tokens_between_centers(promises, seed):
    clear, doubtful = promises.experts_by_doubt(seed, STEPS)
    assert doubtful > 1.05 * clear


def test_the_cost_of_diagonals_does_not_grow_with_the_experts(promises):
    assert promises.growth("cp_diagonal")[0] == 1.0
    assert promises.growth("low_rank") == (16.0, 16.0)


@every_seed
def test_tables_of_tasks_merge_exactly(promises, seed):
    assert promises.merge_error(seed, STEPS) < 1e-12


@every_seed
def test_a_router_learns_which_experts_win(promises, seed):
    before, after = promises.unknown_winners(seed, STEPS)
    assert after < min(0.5, before)


@every_seed
def test_an_adapter_that_grew_is_better_with_each_expert_more(promises, seed):
    grown = promises.slimmed(seed, STEPS, grows=True)
    assert grown[1] > grown[2] > grown[4] > grown[8] == 1


@every_seed
def test_experts_that_choose_tokens_are_used_alike_in_an_encoder(promises, seed):
    assert promises.row_unevenness(seed, STEPS, "expert_choice") == 1.0 < promises.row_unevenness(seed, STEPS, "top_k")
