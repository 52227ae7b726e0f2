"""How good a success detector is: answers to labelled pictures -> scores. Needs no model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_local.lab.asked import Row
from vlm_local.lab.statistics import area_under_roc, calibrate, wilson

MIN_ROWS = 10  # a share of fewer has no interval


def score_answers(rows: Sequence[Row], choices: Sequence[str], precision: float) -> dict[str, Any]:
    """All scores, JSON values only. A failure counts as a wrong answer.

    precision: share of right answers, 0..1, that the thresholds of `by_answer` are to reach. Intervals are Wilson's,
    95 %: they take pictures for independent, which frames of one recording are not.
    """
    right = np.array([row["answer"] == row["label"] for row in rows])
    labels = np.array([choices.index(row["label"]) for row in rows])
    counts = np.bincount(labels, minlength=len(choices))
    report = {
        "images": len(rows),
        "accuracy": float(right.mean()),
        "interval": _find_interval(int(right.sum()), len(rows)),
        "failed": sum(row["answer"] is None for row in rows),
        "majority": {"answer": choices[int(counts.argmax())], "accuracy": float(counts.max() / counts.sum())},
        "choices": list(choices),
        "confusion": _count_confusion(rows, choices),
        "calibration": None,
    }
    told = [row for row in rows if row["probabilities"] is not None]
    probabilities = np.array([[row["probabilities"][choice] for choice in choices] for row in told])  # (N, C)
    report["by_answer"] = {
        choice: _score_choice(choice, rows, told, probabilities[:, at] if told else np.empty(0), precision)
        for at, choice in enumerate(choices)
    }
    if told:
        report["calibration"] = _calibrate(told, probabilities, choices)
    return report


def find_threshold(scores: np.ndarray, is_right: np.ndarray, precision: float) -> dict[str, Any] | None:
    """The lowest score from which on the share of right answers is at least `precision`; None where there is none.

    scores: float (N,), is_right: bool (N,), of the answers that were one choice. Returns the threshold, the precision
    above it with its interval, and how many of the `given` answers are `kept`.
    """
    order = np.argsort(-scores, kind="stable")
    reached = np.arange(1, len(scores) + 1)
    right = is_right[order].cumsum()
    last_of_its_score = np.append(scores[order][1:] != scores[order][:-1], True)[: len(scores)]
    good = (right / reached >= precision) & last_of_its_score
    if not good.any():
        return None
    cut = int(np.flatnonzero(good)[-1])
    return {
        "threshold": float(scores[order][cut]),
        "precision": float(right[cut] / reached[cut]),
        "interval": _find_interval(int(right[cut]), int(reached[cut])),
        "kept": int(reached[cut]),
        "given": len(scores),
    }


def _find_interval(part: int, whole: int) -> list[float] | None:
    """None for fewer than MIN_ROWS."""
    return list(wilson(part, whole)) if whole >= MIN_ROWS else None


def _count_confusion(rows: Sequence[Row], choices: Sequence[str]) -> list[list[int]]:
    """Label down, answer across; the last column counts failures."""
    confusion = np.zeros((len(choices), len(choices) + 1), int)
    for row in rows:
        column = len(choices) if row["answer"] is None else choices.index(row["answer"])
        confusion[choices.index(row["label"]), column] += 1
    return confusion.tolist()


def _score_choice(
    choice: str, rows: Sequence[Row], told: Sequence[Row], probability: np.ndarray, precision: float
) -> dict[str, Any]:
    given = [row for row in rows if row["answer"] == choice]
    labelled = [row for row in rows if row["label"] == choice]
    hits = sum(row["label"] == choice for row in given)
    is_given = np.array([row["answer"] == choice for row in told], bool)
    is_label = np.array([row["label"] == choice for row in told], bool)
    return {
        "images": len(labelled),
        "recall": hits / len(labelled) if labelled else None,
        "precision": hits / len(given) if given else None,
        "auc": area_under_roc(probability, is_label),
        "at_precision": find_threshold(probability[is_given], is_label[is_given], precision)
        if is_given.any()
        else None,
    }


def _calibrate(told: Sequence[Row], probabilities: np.ndarray, choices: Sequence[str]) -> dict[str, Any]:
    """Of the probability given to the answer: bins of (count, sum of it, right), ECE; Brier over all choices."""
    answer = np.array([choices.index(row["answer"]) for row in told])
    label = np.array([choices.index(row["label"]) for row in told])
    truth = np.eye(len(choices))[label]
    brier = float(((probabilities - truth) ** 2).sum(axis=1).mean())
    return {**calibrate(probabilities[np.arange(len(told)), answer], answer == label), "brier": brier}
