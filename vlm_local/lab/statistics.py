"""Statistics of the studies, each once: intervals, tests, area under ROC, calibration.

All intervals are 95 %. Episodes (or scenes) are the independent units: steps of one episode resemble each
other, so intervals and tests that took steps for independent would claim far too much.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

NUM_RESAMPLES = 2000
NUM_BINS = 10  # of probability, for calibration
MAX_EXACT = 14  # units up to which a permutation test counts all 2^n swaps
NUM_SWAPS = 10_000  # random swaps for more units

_Z = 1.959964  # 97.5 % quantile of the normal distribution
_EDGES = (0.025, 0.975)
_RESAMPLES_AT_ONCE, _SWAPS_AT_ONCE = 50, 500  # bounds memory for data sets of many episodes
_KEPT_UNITS = 200  # up to which drawn weights are kept, 3.2 MB: a study asks for the same ones at every score


def wilson(part: float, whole: float) -> tuple[float, float]:
    """Score interval of the share part / whole; (0, 1) where whole is 0.

    Both are counts, or effective counts that are not integers. Wilson, "Probable inference, the law of
    succession, and statistical inference" (1927).
    """
    if whole == 0:
        return 0.0, 1.0
    share, square = part / whole, _Z**2 / whole
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / whole + square / whole / 4)
    low, high = float(max(0.0, middle - half)), float(min(1.0, middle + half))
    return 0.0 if part == 0 else low, 1.0 if part == whole else high  # without the 1e-17 that rounding leaves


def describe_rate(successes: int, num: int) -> dict[str, Any]:
    """rate (None for no trials), interval (Wilson's, to 6 digits as archived reports have it), count, n."""
    interval = tuple(round(edge, 6) for edge in wilson(successes, num))
    return {"rate": successes / num if num else None, "interval": interval, "count": successes, "n": num}


def find_mean_interval(values: np.ndarray) -> list[float]:
    """Student's interval of the mean of two or more values (N,)."""
    half = _find_t(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return [float(values.mean() - half), float(values.mean() + half)]


def _find_t(freedom: int) -> float:
    """97.5 % quantile of Student's distribution, to 0.2 %: Abramowitz and Stegun (1964), 26.7.5."""
    if freedom < 3:
        return (12.7062, 4.3027)[freedom - 1]
    coefficients = ((1, 1), (5, 16, 3), (3, 19, 17, -15), (79, 776, 1482, -1920, -945))
    corrections = (_Z * np.polyval(row, _Z**2) for row in coefficients)
    return _Z + sum(
        term / divisor / freedom**power
        for power, (term, divisor) in enumerate(zip(corrections, (4, 96, 384, 92160), strict=True), 1)
    )


def find_paired_interval(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Interval of the difference (first - second) of two success rates on the same trials, bool (N,) each.

    Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data" (1998), method 10: Wilson's intervals of both rates, and the correlation of the trials.
    """
    num = len(first)
    both, neither = float((first & second).sum()), float((~first & ~second).sum())  # floats: their product is large
    only_first, only_second = float((first & ~second).sum()), float((~first & second).sum())
    product = both * neither - only_first * only_second
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if product > 0:
        product = max(product - num / 2, 0)
    phi = product / math.sqrt(margins) if margins else 0.0
    (low_1, high_1), (low_2, high_2) = wilson(first.sum(), num), wilson(second.sum(), num)
    one, two = first.mean(), second.mean()

    def spread(near: float, far: float) -> float:
        return math.sqrt(max(near**2 - 2 * phi * near * far + far**2, 0.0))

    difference = one - two
    return [
        float(difference - spread(one - low_1, high_2 - two)),
        float(difference + spread(high_1 - one, two - low_2)),
    ]


def draw_weights(num_units: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap: how often each unit is drawn when as many are drawn as there are, with replacement.

    Yields float64 (resamples, num_units), not to be changed, until there are NUM_RESAMPLES; the same for the same
    seed. Any score that is a function of sums over units is resampled by weighting these sums.
    """
    return iter(_keep_weights(num_units, seed)) if num_units <= _KEPT_UNITS else _draw_weights(num_units, seed)


@functools.lru_cache(maxsize=4)
def _keep_weights(num_units: int, seed: int) -> tuple[np.ndarray, ...]:
    weights = np.concatenate(list(_draw_weights(num_units, seed)))
    weights.flags.writeable = False
    return (weights,)


def _draw_weights(num_units: int, seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    offsets = num_units * np.arange(_RESAMPLES_AT_ONCE)[:, None]
    for _ in range(NUM_RESAMPLES // _RESAMPLES_AT_ONCE):
        picks = random.integers(0, num_units, (_RESAMPLES_AT_ONCE, num_units)) + offsets
        counts = np.bincount(picks.ravel(), minlength=_RESAMPLES_AT_ONCE * num_units)
        yield counts.reshape(_RESAMPLES_AT_ONCE, num_units).astype(np.float64)


def find_interval(values: np.ndarray) -> list[float] | None:
    """Percentile interval of resampled scores; NaN ones are left out, None where all are."""
    values = values[np.isfinite(values)]
    return np.quantile(values, _EDGES).tolist() if len(values) else None


def widen_certain(interval: Sequence[float], num_units: int) -> list[float]:
    """The resampled interval of a share; Wilson's over units where each unit gave 0, or each 1.

    Resampling equal units shows no spread, which would claim that 0 of a few is 0 of any number.
    """
    low, high = interval
    return list(wilson(low * num_units, num_units)) if low == high and low in (0, 1) else [low, high]


def bootstrap_ratio(parts: np.ndarray, wholes: np.ndarray, seed: int) -> list[float] | None:
    """Interval of sum(parts) / sum(wholes), float (N,) each, over units drawn by `draw_weights`."""
    with np.errstate(invalid="ignore"):  # a draw of units whose wholes are all 0
        ratios = [(weights @ parts) / (weights @ wholes) for weights in draw_weights(len(parts), seed)]
    return find_interval(np.concatenate(ratios))


def compare_sums(ours: np.ndarray, theirs: np.ndarray, steps: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Paired comparison of two policies on the same episodes.

    ours, theirs: right answers per episode (E,); steps: answered steps per episode (E,). Returns
    difference (of the shares of right answers), its bootstrap interval (None for one episode), p_value, episodes.
    """
    lead = ours - theirs
    return {
        "difference": float(lead.sum() / steps.sum()),
        "episodes": len(lead),
        "interval": bootstrap_ratio(lead, steps, seed) if len(lead) > 1 else None,
        "p_value": permutation_test(lead, seed),
    }


def permutation_test(lead: np.ndarray, seed: int) -> float:
    """Two-sided p-value of sum(lead), float (N,), under random signs of its terms.

    If both policies were equally good, the two results of an episode could be swapped, which changes the sign of its
    term (Fisher, "The Design of Experiments", 1935). All 2^N swaps are counted for up to MAX_EXACT terms, else
    NUM_SWAPS random ones and the observed one, so that p is never 0 (Phipson and Smyth, 2010).
    """
    observed = abs(lead.sum())
    differing = lead[lead != 0]  # swapping equal results changes nothing
    if len(differing) <= MAX_EXACT:
        sums = np.zeros(1)
        for value in differing:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= observed - 1e-9))
    random, hits = np.random.default_rng(seed), 0
    for _ in range(NUM_SWAPS // _SWAPS_AT_ONCE):
        kept = random.integers(0, 2, (_SWAPS_AT_ONCE, len(differing)), np.int8).astype(np.float64)
        hits += int((np.abs(2 * (kept @ differing) - differing.sum()) >= observed - 1e-9).sum())
    return (hits + 1) / (NUM_SWAPS + 1)


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of tests, adjusted so that the family claims something false in 5 % of cases at most.

    Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def area_under_roc(scores: np.ndarray, is_positive: np.ndarray) -> float | None:
    """Probability that a positive scores above a negative, ties half; None where one kind is missing.

    scores: float (N,); is_positive: bool (N,). The Mann-Whitney statistic: Hanley and McNeil, "The meaning and use of
    the area under a receiver operating characteristic curve" (1982).
    """
    num_positive = int(is_positive.sum())
    num_negative = len(is_positive) - num_positive
    if num_positive == 0 or num_negative == 0:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]  # 1-based, ties share their mean
    excess = ranks[is_positive].sum() - num_positive * (num_positive + 1) / 2
    return float(excess / (num_positive * num_negative))


def find_bins(probabilities: np.ndarray) -> np.ndarray:
    """Index of each probability's bin, int of the same shape: NUM_BINS equal bins of 0 to 1; 1 is in the last."""
    return np.minimum((probabilities * NUM_BINS).astype(int), NUM_BINS - 1)


def find_calibration_gap(bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expected calibration error times the number of answers, and that number, for bins of any leading shape.

    bins: float (..., NUM_BINS, 3): number of answers, sum of their probabilities, number of right ones. Naeini, Cooper
    and Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning" (2015).
    """
    return np.abs(bins[..., 1] - bins[..., 2]).sum(axis=-1), bins[..., 0].sum(axis=-1)


def calibrate(probabilities: np.ndarray, is_right: np.ndarray) -> dict[str, Any]:
    """Of answers (N,): "bins" as above, and "ece", the expected calibration error."""
    bins = np.zeros((NUM_BINS, 3))
    answers = np.stack([np.ones(len(probabilities)), probabilities, is_right], axis=1)
    np.add.at(bins, find_bins(probabilities), answers)
    gap, count = find_calibration_gap(bins)
    return {"ece": float(gap / count), "bins": bins.tolist()}
