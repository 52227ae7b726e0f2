"""Finished episodes -> success, steps and paired losses with 95 % intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_local.lab.ceiling.play import MAX_STEPS
from vlm_local.lab.ceiling.settings import MISSED, OPPOSITE, PLAIN, SLIPPING_AXES, TABLE_RATE, Curve, Setting, slip
from vlm_local.lab.closed_loop.scores import AUTOEVAL_STEPS, wilson

_Z = 1.959964  # 95 %
LIMITS = (AUTOEVAL_STEPS, MAX_STEPS)

Steps = Sequence[int | None]


def score_study(
    steps: Mapping[tuple[str, Setting], Steps], tasks: Sequence[str], curves: Sequence[Curve]
) -> dict[str, Any]:
    """steps: of Episodes.collect.

    Returns "curves", each with its points by task, and "losses": kind -> axis -> task -> `find_loss`.
    """
    lines = [
        {
            "study": curve.study,
            "line": curve.line,
            "xs": curve.xs,
            "tasks": {task: [score_steps(steps[task, setting]) for setting in curve.settings] for task in tasks},
        }
        for curve in curves
    ]
    losses = {
        kind: {
            axis: {task: find_loss(steps[task, PLAIN], steps[task, slip(axis, kind, TABLE_RATE)]) for task in tasks}
            for axis in SLIPPING_AXES
        }
        for kind in (MISSED, OPPOSITE)
    }
    return {"curves": lines, "losses": losses}


def score_steps(steps: Steps) -> dict[str, Any]:
    """success_70, success_120: {rate, interval (Wilson), count, n}; steps: mean over successes, with interval."""
    took = np.array([took for took in steps if took is not None], float)
    point: dict[str, Any] = {}
    for limit in LIMITS:
        count = int((took <= limit).sum())
        rate = {"rate": count / len(steps), "interval": wilson(count, len(steps)), "count": count, "n": len(steps)}
        point[f"success_{limit}"] = rate
    if len(took) > 1:
        half = _Z * took.std(ddof=1) / math.sqrt(len(took))
        point["steps"] = {"mean": took.mean(), "interval": [took.mean() - half, took.mean() + half], "n": len(took)}
    else:
        point["steps"] = None
    return point


def find_loss(plain: Steps, slipping: Steps) -> dict[str, Any]:
    """Points of success within 70 steps that the same episodes lose, with a paired interval; and steps more.

    more_steps: mean over the episodes in which both succeed; None where there is none.
    """
    before, after = (np.array([took is not None and took <= AUTOEVAL_STEPS for took in of]) for of in (plain, slipping))
    both = [late - early for early, late in zip(plain, slipping, strict=True) if early and late]
    return {
        "loss": float(before.mean() - after.mean()),
        "interval": find_paired_interval(before, after),
        "more_steps": float(np.mean(both)) if both else None,
    }


def find_paired_interval(first: np.ndarray, second: np.ndarray) -> list[float]:
    """95 % interval of the difference of two shares of the same episodes, bool (N,) each.

    Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data" (1998), method 10: Wilson's intervals of both, and their correlation.
    """
    num = len(first)
    both, neither = (first & second).sum(), (~first & ~second).sum()
    only_first, only_second = (first & ~second).sum(), (~first & second).sum()
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
