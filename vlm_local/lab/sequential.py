"""Two policies compared while they play: a test that may be looked at after every pair of episodes.

A pair's lead is what the first policy scored minus what the second did on the same scene, in [-1, 1]. A gambler bets
that the leads' mean is another than `mean`: a fixed share of the capital on every pair, in both directions and with
shares of several sizes at once. If `mean` is true, such bets are fair at best, and the capital, which begins at 1,
reaches 1 / alpha with probability alpha at most, however long one plays and whenever one stops (Ville, "Etude critique
de la notion de collectif", 1939). The means at which it never did form a confidence sequence. Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting" (2024); the mixture over shares is that of Cover, "Universal
portfolios" (1991).
"""

import numpy as np

ALPHA = 0.05
POWER = 0.8  # that a comparison is planned for
_SHARES = np.array([0.2, 0.4, 0.8])  # of the capital, on every pair
_GRID = np.linspace(-0.995, 0.995, 399)  # means that the confidence sequence tries
_NUM_SIMULATED = 1000
_AT_ONCE = 250  # simulated comparisons, bounds memory


def grow_capital(leads: np.ndarray, mean: float = 0.0) -> np.ndarray:
    """Logarithm of the capital after each pair, (..., N). leads: float (..., N) in [-1, 1]. mean: in (-1, 1)."""
    stakes = np.concatenate([_SHARES / (1 + mean), -_SHARES / (1 - mean)])  # no lead costs more than the share
    growth = np.log1p(np.multiply.outer(stakes, leads - mean)).cumsum(axis=-1)
    largest = growth.max(axis=0)  # which np.logaddexp takes out for every pair of stakes, several times as slowly
    return largest + np.log(np.exp(growth - largest).mean(axis=0))


def find_decision(leads: np.ndarray, alpha: float = ALPHA, every: int = 1) -> np.ndarray:
    """After how many pairs the policies are told apart, int (...); 0 where they are not. leads: float (..., N).

    every: leads of this many tasks in turn, whose means may differ, are looked at after the last of them only: then the
    bet on their common mean is no better than fair, since a product is largest where its factors are alike.
    """
    reached = grow_capital(leads)[..., every - 1 :: every] >= -np.log(alpha)
    return np.where(reached.any(axis=-1), (reached.argmax(axis=-1) + 1) * every, 0)


def find_confidence_interval(leads: np.ndarray, alpha: float = ALPHA, every: int = 1) -> list[float]:
    """Where the mean lead lies after these pairs, float (N,); true at all times at once with probability 1 - alpha.

    every: as `find_decision`.
    """
    threshold = -np.log(alpha)
    kept = [mean for mean in _GRID if grow_capital(leads, mean)[every - 1 :: every].max(initial=0.0) < threshold]
    if not kept:  # the interval lies between two means of the grid
        return [float(leads.mean())] * 2
    low, high = float(kept[0]), float(kept[-1])
    return [-1.0 if low == _GRID[0] else low, 1.0 if high == _GRID[-1] else high]


def simulate_power(difference: float, num_pairs: int, alpha: float = ALPHA) -> tuple[float, float]:
    """(share of comparisons that are decided within num_pairs, mean number of pairs played until then or the end).

    difference: of success rates around 50 %, the two of a pair independent of each other, which is the hardest case.
    """
    random, decisions = np.random.default_rng(0), []
    for _ in range(_NUM_SIMULATED // _AT_ONCE):
        draws = random.random((2, _AT_ONCE, num_pairs))
        leads = (draws[0] < 0.5 + difference / 2) * 1.0 - (draws[1] < 0.5 - difference / 2)
        decisions.append(find_decision(leads, alpha))
    decided = np.concatenate(decisions)
    return float((decided > 0).mean()), float(np.where(decided > 0, decided, num_pairs).mean())


def find_detectable_effect(num_pairs: int, alpha: float = ALPHA) -> float | None:
    """The smallest difference of success rates, in steps of 5 points, that num_pairs decide with POWER."""
    differences = (step / 20 for step in range(1, 20))
    return next((value for value in differences if simulate_power(value, num_pairs, alpha)[0] >= POWER), None)
