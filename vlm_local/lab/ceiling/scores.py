"""Finished episodes -> success, steps and paired losses with 95 % intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_local.lab.ceiling.play import MAX_STEPS
from vlm_local.lab.ceiling.settings import ERROR_AXES, MISSED, OPPOSITE, PLAIN, TABLE_RATE, Curve, Setting, build_error
from vlm_local.lab.statistics import describe_rate, find_mean_interval, find_paired_interval
from vlm_local.sim.tasks import AUTOEVAL_STEPS

LIMITS = (AUTOEVAL_STEPS, MAX_STEPS)

Steps = Sequence[int | None]  # control steps to success of each episode, None for none


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
            axis: {task: find_loss(steps[task, PLAIN], steps[task, wrong]) for task in tasks}
            for axis in ERROR_AXES
            for wrong in [build_error(axis, kind, TABLE_RATE)]
        }
        for kind in (MISSED, OPPOSITE)
    }
    return {"curves": lines, "losses": losses}


def score_steps(steps: Steps) -> dict[str, Any]:
    """success_70, success_120: `describe_rate`; steps: {mean, interval, n} of successes, None for fewer than two."""
    took = np.array([took for took in steps if took is not None], float)
    point = {f"success_{limit}": describe_rate(int((took <= limit).sum()), len(steps)) for limit in LIMITS}
    if len(took) > 1:
        return point | {"steps": {"mean": took.mean(), "interval": find_mean_interval(took), "n": len(took)}}
    return point | {"steps": None}


def find_loss(plain: Steps, worse: Steps) -> dict[str, Any]:
    """What a setting costs: both hold the steps of the same episodes.

    loss: of the share of success within 70 steps, with a paired interval. more_steps: mean of the additional control
    steps over the episodes in which both succeed; None where there is none.
    """
    before, after = (np.array([took is not None and took <= AUTOEVAL_STEPS for took in of]) for of in (plain, worse))
    both = [late - early for early, late in zip(plain, worse, strict=True) if early and late]
    return {
        "loss": float(before.mean() - after.mean()),
        "interval": find_paired_interval(before, after),
        "more_steps": float(np.mean(both)) if both else None,
    }
