"""Two policies on the same steps.

The test is a permutation test over episodes: if both were equally good, each episode's two results
could be swapped. The statistic is the difference of the exact shares; two-sided; all 2^E swaps are
counted for up to MAX_EXACT episodes, NUM_SWAPS random ones otherwise (with the observed one counted
in, so that p is never 0). Steps of one episode resemble each other, so swapping steps would claim
far too much.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_local.errors import DataError
from vlm_local.lab.offline.rows import Rows
from vlm_local.lab.offline.tally import tally_phrases
from vlm_local.lab.statistics import draw_weights, find_interval
from vlm_local.types import AXES

MAX_EXACT = 14
NUM_SWAPS = 10_000
_CHUNK = 500


def compare_exact(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, Any]:
    """Difference of exact shares (ours - theirs), its bootstrap interval and p-value, from `tally_phrases`."""
    return compare_sums(ours["exact"][:, 0], theirs["exact"][:, 0], ours["steps"][:, 0], seed)


def compare_sums(ours: np.ndarray, theirs: np.ndarray, steps: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Right answers (E,) of both and steps (E,) per episode -> difference, interval, p_value, episodes.

    The interval is None for one episode.
    """
    lead = ours - theirs
    result = {"difference": float(lead.sum() / steps.sum()), "episodes": len(lead), "interval": None}
    if len(lead) > 1:
        with np.errstate(invalid="ignore"):  # a draw of episodes without such a step
            shares = [(weights @ lead) / (weights @ steps) for weights in draw_weights(len(lead), seed)]
        result["interval"] = find_interval(np.concatenate(shares))
    return result | {"p_value": _permutation_p(lead, np.random.default_rng(seed))}


def _permutation_p(lead: np.ndarray, random: np.random.Generator) -> float:
    """Two-sided p-value of sum(lead) under random signs of its terms."""
    observed = abs(lead.sum())
    differing = lead[lead != 0]  # swapping equal results changes nothing
    if len(differing) <= MAX_EXACT:
        sums = np.zeros(1)
        for value in differing:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= observed - 1e-9))
    hits = 0
    for _ in range(NUM_SWAPS // _CHUNK):
        kept = random.integers(0, 2, (_CHUNK, len(differing)), np.int8).astype(np.float64)
        hits += int((np.abs(2 * (kept @ differing) - differing.sum()) >= observed - 1e-9).sum())
    return (hits + 1) / (NUM_SWAPS + 1)


def compare_rows(ours: Rows, theirs: Rows, seed: int = 0) -> dict[str, Any]:
    """Both evaluations on the steps they share: exact share, moving steps alone, and accuracy per axis.

    Raises DataError where they share no step, or disagree on a label: then the data differ.
    """
    ours, theirs = _align(ours, theirs)
    a, b = (tally_phrases(rows, rows.answer, rows.answered) for rows in (ours, theirs))
    result = {
        "steps": len(ours),
        "exact": _side_by_side(a["exact"][:, 0], b["exact"][:, 0], a["steps"][:, 0], seed),
        "moving": _side_by_side(a["exact"][:, 1], b["exact"][:, 1], a["steps"][:, 1], seed),
    }
    steps = a["steps"][:, 0]
    right_a, right_b = (np.diagonal(sums["confusion"], axis1=-2, axis2=-1).sum(axis=-1) for sums in (a, b))  # (E, 6)
    for column, axis in enumerate(AXES):
        result[axis] = _side_by_side(right_a[:, column], right_b[:, column], steps, seed)
    return result


def _side_by_side(ours: np.ndarray, theirs: np.ndarray, steps: np.ndarray, seed: int) -> dict[str, Any] | None:
    """None where there is no step to compare."""
    if not steps.sum():
        return None
    shares = {"ours": float(ours.sum() / steps.sum()), "theirs": float(theirs.sum() / steps.sum())}
    return shares | {"steps": int(steps.sum())} | compare_sums(ours, theirs, steps, seed)


def _align(ours: Rows, theirs: Rows) -> tuple[Rows, Rows]:
    """Both reduced to the steps they share, in the same order."""
    places = []
    for rows in (ours, theirs):
        ids = rows.episode_ids[rows.episode]
        places.append({key: index for index, key in enumerate(zip(ids.tolist(), rows.step.tolist(), strict=True))})
    shared = [key for key in places[0] if key in places[1]]
    if not shared:
        raise DataError("the two evaluations share no step; both must be of the same data set")
    a, b = (rows.select([place[key] for key in shared]) for rows, place in zip((ours, theirs), places, strict=True))
    differing = (a.label != b.label).any(axis=1)
    if differing.any():
        episode, step = shared[int(differing.argmax())]
        raise DataError(
            f"the two evaluations disagree on {int(differing.sum())} of {len(shared)} labels, first on episode "
            f"{episode}, step {step}; both must be of the same data set"
        )
    return a, b
