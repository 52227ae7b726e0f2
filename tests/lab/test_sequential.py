"""The anytime-valid test: what it promises, on drawn comparisons that are looked at after every pair."""

import numpy as np
import pytest

from vlm_local.lab.sequential import (
    ALPHA,
    find_confidence_interval,
    find_decision,
    find_detectable_effect,
    grow_capital,
    simulate_power,
)

THRESHOLD = -np.log(ALPHA)


def test_the_capital_is_that_of_fair_bets():
    leads = np.array([1.0, 1.0, 0.0, -0.5])
    shares = np.array([0.2, 0.4, 0.8, -0.2, -0.4, -0.8])
    by_hand = [np.mean(np.prod(1 + shares[:, None] * leads[:at], axis=1)) for at in range(1, 5)]
    assert np.exp(grow_capital(leads)) == pytest.approx(by_hand) and by_hand[0] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["independent", "alike", "graded"])
def test_equal_policies_are_seldom_told_apart_however_often_one_looks(kind):
    random, num, pairs = np.random.default_rng(0), 4000, 200
    false_winners = 0
    for _ in range(num // 500):
        ours, theirs = random.random((2, 500, pairs))
        if kind == "alike":  # the scene decides in nine of ten pairs
            theirs = np.where(random.random((500, pairs)) < 0.9, ours, theirs)
        leads = (
            np.floor(4 * ours) / 3 - np.floor(4 * theirs) / 3
            if kind == "graded"
            else (ours < 0.5) * 1.0 - (theirs < 0.5)
        )
        false_winners += (find_decision(leads) > 0).sum()
    assert false_winners / num <= ALPHA


@pytest.mark.parametrize("means", [(0.3,), (0.6, -0.2)])
def test_the_mean_lies_in_the_interval_at_all_times(means):
    """means: of the leads of each task, in turn."""
    random = np.random.default_rng(0)
    chances = np.tile([(1 + mean) / 2 for mean in means], 100)
    leads = np.where(random.random((2000, len(chances))) < chances, 1.0, -1.0)
    capital = grow_capital(leads, float(np.mean(means)))[:, len(means) - 1 :: len(means)]
    assert (capital.max(axis=1) >= THRESHOLD).mean() <= ALPHA
    low, high = find_confidence_interval(leads[0], every=len(means))
    assert low < np.mean(means) < high < low + 0.5


def test_policies_that_are_each_better_in_half_of_the_tasks_are_not_told_apart():
    leads = np.tile([1.0] * 20 + [-1.0] * 20, 3)  # of 40 tasks in turn
    assert find_decision(leads) == 8  # in the midst of the first seed
    assert find_decision(leads, every=40) == 0
    assert find_decision(np.ones(120), every=40) == 40


def test_a_difference_of_20_points_costs_fewer_episodes_than_a_fixed_number_with_the_same_power():
    power, num_pairs = simulate_power(0.2, 250)
    assert power > 0.9
    normal_quantile = 1.555  # of the power of 0.94 that is found
    fixed = (1.96 + normal_quantile) ** 2 * 2 * 0.24 / 0.2**2  # success rates of 40 and 60 %, independent
    assert power > 0.94 and num_pairs < 0.8 * fixed


def test_what_can_be_found_shrinks_with_the_number_of_pairs():
    found = [find_detectable_effect(num_pairs) for num_pairs in (5, 50, 200)]
    assert found[0] is None and found[1] > found[2]


def test_no_pair_says_nothing():
    assert find_confidence_interval(np.zeros(0)) == [-1.0, 1.0]
