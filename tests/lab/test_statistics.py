"""Each statistic against published numbers, all cases counted, or what it promises on drawn data."""

import itertools

import numpy as np
import pytest

from vlm_local.lab.statistics import (
    adjust_holm,
    area_under_roc,
    bootstrap_ratio,
    compare_sums,
    describe_rate,
    find_bins,
    find_calibration_gap,
    find_mean_interval,
    find_paired_interval,
    permutation_test,
    widen_certain,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "num", "low", "high"),
    [  # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3
        *[(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
        (45, 50, 0.7864, 0.9565),  # R's package binom
    ],
)
def test_wilson(successes, num, low, high):
    assert wilson(successes, num) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("num", "quantile"), [(2, 12.7062), (3, 4.3027), (4, 3.1824), (5, 2.7764), (10, 2.2622), (30, 2.0452)]
)
def test_the_interval_of_a_mean_is_students(num, quantile):
    values = 5 + np.arange(num) ** 2
    half = quantile * values.std(ddof=1) / np.sqrt(num)
    assert find_mean_interval(values) == pytest.approx([values.mean() - half, values.mean() + half], abs=0.003 * half)


def test_a_million_pairs_do_not_overflow():
    first = np.arange(1_000_000) % 2 == 0
    second = np.arange(1_000_000) % 3 == 0
    low, high = find_paired_interval(first, second)
    assert low < first.mean() - second.mean() < high and 0.001 < high - low < 0.004


def test_no_trials_say_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    assert all(wilson(0, num)[0] == 0 and wilson(num, num)[1] == 1 for num in range(1, 60))


def test_the_p_value_is_that_of_all_swaps_of_episodes():
    random = np.random.default_rng(0)
    ours, theirs = random.integers(0, 9, (2, 8)).astype(float)
    lead = ours - theirs
    swaps = [abs(np.dot(signs, lead)) >= abs(lead.sum()) for signs in itertools.product((1, -1), repeat=8)]
    assert compare_sums(ours, theirs, np.full(8, 10.0))["p_value"] == pytest.approx(np.mean(swaps))


def test_many_episodes_give_nearly_the_same_p_value_by_random_swaps():
    random = np.random.default_rng(1)
    lead = random.normal(0.15, 1, 200)
    result = compare_sums(lead, np.zeros(200), np.ones(200))
    statistic = lead.sum() / np.sqrt((lead**2).sum())
    expected = np.mean(np.abs(random.normal(size=200_000)) >= abs(statistic))
    assert result["p_value"] == pytest.approx(expected, abs=0.02)
    assert compare_sums(lead, np.zeros(200), np.ones(200)) == result


def test_random_swaps_count_ties_and_what_was_observed():
    lead = np.repeat([1.0, -1.0], [15, 5])  # twice the share of 15 heads or more among 20 coins
    assert permutation_test(lead, seed=0) == pytest.approx(0.0414, abs=0.006)
    assert permutation_test(np.ones(40), seed=0) == 1 / 10_001


def test_equal_policies_differ_by_nothing():
    result = compare_sums(np.array([3.0, 4]), np.array([3.0, 4]), np.array([5.0, 5]))
    assert (result["difference"], result["p_value"], result["interval"]) == (0, 1, [0, 0])


@pytest.mark.parametrize(
    ("counts", "low", "high"),  # both right, only the first, only the second, neither
    [
        # Altman and others, "Statistics with confidence", 2000, page 52
        ((14, 5, 0, 22), 0.011, 0.226),
        # Fagerland, Lydersen and Laake, "Statistical analysis of contingency tables", 2017, chapter 8
        ((59, 6, 16, 80), -0.1186, -0.0046),
    ],
)
def test_paired_intervals_of_the_books(counts, low, high):
    pairs = np.repeat([(True, True), (True, False), (False, True), (False, False)], counts, axis=0)
    assert find_paired_interval(*pairs.T) == pytest.approx([low, high], abs=6e-4 if low > 0 else 6e-5)


def test_paired_intervals_hold_what_they_promise():
    """The first wins some episodes alone, the second others: 95 % of the intervals hold the difference."""
    random, first_alone, second_alone, num = np.random.default_rng(0), 0.15, 0.05, 60
    held = 0
    for _ in range(400):
        which, both = random.random(num), random.random(num) < 0.8
        is_first, is_second = which < first_alone, which > 1 - second_alone
        first, second = (both | is_first) & ~is_second, (both | is_second) & ~is_first
        low, high = find_paired_interval(first, second)
        held += low <= first_alone - second_alone <= high
        assert find_paired_interval(second, first) == pytest.approx([-high, -low], abs=1e-5)
    assert 0.92 <= held / 400 <= 0.99
    certain = np.ones(100, bool)
    assert find_paired_interval(certain, certain) == pytest.approx([-0.037, 0.037], abs=0.001)


def test_a_difference_is_that_of_the_shares_and_of_several_episodes():
    result = compare_sums(np.array([3.0, 4]), np.array([1.0, 1]), np.array([5.0, 5]))
    assert result["difference"] == 0.5 and result["episodes"] == 2 and result["interval"] == pytest.approx([0.4, 0.6])
    assert compare_sums(np.array([3.0]), np.array([1.0]), np.array([5.0]))["interval"] is None


def test_ties_count_half_in_the_area():
    assert area_under_roc(np.array([0.5, 0.5, 0.9]), np.array([True, False, True])) == 0.75
    assert area_under_roc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])) == 0.75
    for is_positive in (True, False):
        assert area_under_roc(np.array([0.5]), np.array([is_positive])) is None


def test_a_rate_says_what_it_rests_on():
    assert describe_rate(0, 0) == {"rate": None, "interval": (0.0, 1.0), "count": 0, "n": 0}
    assert describe_rate(1, 4) == {"rate": 0.25, "interval": (0.045587, 0.699358), "count": 1, "n": 4}


def test_a_bootstrap_of_a_ratio_draws_units():
    parts, wholes = np.array([1.0, 0, 3, 0]), np.array([1.0, 0, 4, 2])
    low, high = bootstrap_ratio(parts, wholes, seed=0)
    assert 0 <= low < 4 / 7 < high <= 1 and bootstrap_ratio(parts, wholes, seed=0) == [low, high]
    assert bootstrap_ratio(np.zeros(3), np.zeros(3), seed=0) is None


@pytest.mark.parametrize("num", [100, 400])  # few enough that drawn weights are kept, and more
def test_a_bootstrap_interval_holds_95_percent_of_what_is_drawn(num):
    # The binomial distribution's quantiles of 0.025 and 0.975
    expected = {100: [0.40, 0.60], 400: [0.45, 0.55]}[num]
    assert bootstrap_ratio(np.arange(num) % 2, np.ones(num), seed=0) == pytest.approx(expected, abs=0.004)


def test_equal_units_are_not_certain():
    assert widen_certain([0.0, 0.0], 20) == [0.0, pytest.approx(0.1611, abs=5e-5)]
    assert widen_certain([1.0, 1.0], 20) == [pytest.approx(0.8389, abs=5e-5), 1.0]
    for interval in ([0.5, 0.5], [0.0, 0.2], [0.9, 1.0]):
        assert widen_certain(interval, 20) == interval


def test_calibration_bins_hold_their_lower_edge():
    assert find_bins(np.array([0.0, 0.09, 0.1, 0.95, 1.0])).tolist() == [0, 0, 1, 9, 9]
    gap, count = find_calibration_gap(np.array([[[2, 0.3, 1], [2, 1.8, 1]], [[1, 0.5, 1], [0, 0, 0]]]))
    assert gap == pytest.approx([0.7 + 0.8, 0.5]) and count.tolist() == [4, 1]


def test_holm():
    # Holm's rule by hand: sorted p-values times 4, 3, 2, 1, never falling, at most 1; as R's p.adjust has it
    assert adjust_holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert adjust_holm([0.5, 0.9]) == [1.0, 1.0] and adjust_holm([0.03]) == [0.03] and adjust_holm([]) == []


def test_holm_keeps_the_share_of_false_claims_of_a_family():
    p_values = np.random.default_rng(0).random((4000, 6))  # six true null hypotheses each
    false_claims = np.mean([min(adjust_holm(family)) <= 0.05 for family in p_values])
    assert 0.035 < false_claims < 0.06  # 1 - 0.95 ** 6 = 0.26 unadjusted
