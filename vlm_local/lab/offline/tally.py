"""Rows and answers -> sums per episode, of which every score is a function.

That makes an interval by bootstrap over episodes the same function of resampled sums. Steps without
an answer are not exact, and are left out of every other sum.
"""

import numpy as np

from vlm_local.lab.offline.rows import Rows
from vlm_local.lab.statistics import NUM_BINS, find_bins
from vlm_local.types import AXES

GRIPPER_TOLERANCE_STEPS = 3  # a label looks this many steps ahead
SPLITS = ("all", "moving", "still", "full_window", "short_window")
_GRIPPER = AXES.index("gripper")


def tally_phrases(rows: Rows, answer: np.ndarray, answered: np.ndarray) -> dict[str, np.ndarray]:
    """Sums per episode of what these answers say.

    answer: int8 (N, 6) signs; answered: bool (N,). Returns "exact" and "steps", (E, S) for SPLITS;
    "three_axis" and "answered" (E,); "confusion" (E, 6, 3, 3) by axis, label and answer, each in the
    order -, 0, +; "gripper_events" (E, 3): found in time, in the labels, in the answers.
    """
    exact = answered & (answer == rows.label).all(axis=1)
    moving = rows.label.any(axis=1)
    splits = np.stack([np.full(len(rows), True), moving, ~moving, rows.full_window, ~rows.full_window], axis=1)
    confusion = np.zeros((len(rows.episode_ids), len(AXES), 3, 3))
    seen = np.flatnonzero(answered)
    place = (rows.episode[seen, None], np.arange(len(AXES)), rows.label[seen] + 1, answer[seen] + 1)
    np.add.at(confusion, place, 1)
    return {
        "steps": _sum_by_episode(rows, splits),
        "exact": _sum_by_episode(rows, splits & exact[:, None]),
        "answered": _sum_by_episode(rows, answered),
        "three_axis": _sum_by_episode(rows, answered & (answer[:, :3] != 0).all(axis=1)),
        "confusion": confusion,
        "gripper_events": _match_gripper_events(rows, np.where(answered, answer[:, _GRIPPER], 0)),
    }


def tally_actions(rows: Rows) -> dict[str, np.ndarray]:
    """Scores of the numbers themselves, an episode at a time as mse-check has them.

    "actions" (E, 4): mean squared error, the same without the gripper, cosine of the episode's actions
    as one vector, the same without the gripper; "action_episodes" (E,): 1 where there were any.
    """
    known = np.all(np.isfinite(np.hstack([rows.action, rows.recorded_action])), axis=1)
    ours, recorded = (np.where(known[:, None], actions, 0.0) for actions in (rows.action, rows.recorded_action))
    products = np.stack([(ours - recorded) ** 2, ours * recorded, ours**2, recorded**2], axis=2)  # (N, 7, 4)
    products = _sum_by_episode(rows, products)
    counts = _sum_by_episode(rows, known)
    columns = []
    for width in (7, 6):
        squares, dot, ours_squared, recorded_squared = np.moveaxis(products[:, :width].sum(axis=1), 1, 0)
        lengths = np.sqrt(ours_squared * recorded_squared)
        columns += [
            np.divide(squares, counts * width, out=np.zeros_like(squares), where=counts > 0),
            np.divide(dot, lengths, out=np.zeros_like(dot), where=lengths > 0),
        ]
    mse, cosine, mse_without, cosine_without = columns
    return {
        "actions": np.stack([mse, mse_without, cosine, cosine_without], axis=1),
        "action_episodes": (counts > 0).astype(np.float64),
    }


def tally_calibration(rows: Rows) -> dict[str, np.ndarray]:
    """Sums for the calibration of the answered phrase (first) and of its sign on each axis.

    "bins" (E, 7, NUM_BINS, 3): by bin of the probability given to the answer, their count, the sum of
    these probabilities, and how many were right. "brier" (E, 7): sum of (probability - right)^2.
    """
    picked = np.take_along_axis(rows.marginals, rows.answer[:, :, None].astype(int) + 1, axis=2)[:, :, 0]
    probability = np.concatenate([rows.probability[:, None], picked], axis=1)  # (N, 7)
    right = np.concatenate([(rows.answer == rows.label).all(axis=1, keepdims=True), rows.answer == rows.label], axis=1)
    known = np.isfinite(probability) & rows.answered[:, None]
    probability = np.where(known, probability, 0.0)
    bins = np.zeros((len(rows.episode_ids), probability.shape[1], NUM_BINS, 3))
    place = (rows.episode[:, None], np.arange(probability.shape[1]), find_bins(probability))
    np.add.at(bins, place, np.stack([known, probability, right & known], axis=2))
    return {"bins": bins, "brier": _sum_by_episode(rows, np.where(known, (probability - right) ** 2, 0.0))}


def _sum_by_episode(rows: Rows, values: np.ndarray) -> np.ndarray:
    """(N, ...) -> float (E, ...)"""
    sums = np.zeros((len(rows.episode_ids), *values.shape[1:]))
    np.add.at(sums, rows.episode, values)
    return sums


def _match_gripper_events(rows: Rows, answer: np.ndarray) -> np.ndarray:
    """An event is the first step of a run of one gripper word. answer: int (N,) gripper signs.

    An event of the labels is found by the first answered event of the same word, not more than
    GRIPPER_TOLERANCE_STEPS before or after, that has not found another.
    """
    found, wanted, said = np.zeros((3, len(rows.episode_ids)))
    waiting: dict[tuple[int, int], list[int]] = {}
    for episode, step, sign in _list_onsets(rows, answer):
        said[episode] += 1
        waiting.setdefault((episode, sign), []).append(step)
    for episode, step, sign in _list_onsets(rows, rows.label[:, _GRIPPER]):
        wanted[episode] += 1
        candidates = waiting.get((episode, sign), [])
        match = next((at for at in candidates if abs(at - step) <= GRIPPER_TOLERANCE_STEPS), None)
        if match is not None:
            candidates.remove(match)
            found[episode] += 1
    return np.stack([found, wanted, said], axis=1)


def _list_onsets(rows: Rows, signs: np.ndarray) -> list[tuple[int, int, int]]:
    """(episode, step, sign) where a run of a non-zero sign begins. signs: int (N,)."""
    begins = signs != 0
    begins[1:] &= (signs[1:] != signs[:-1]) | (rows.episode[1:] != rows.episode[:-1])
    at = np.flatnonzero(begins)
    return list(zip(rows.episode[at].tolist(), rows.step[at].tolist(), signs[at].tolist(), strict=True))
