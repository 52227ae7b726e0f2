"""Outcomes of episodes -> success rates with intervals, steps, step ratio, and where it failed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

AUTOEVAL_STEPS = 70  # AutoEval's limit; success within it is always reported beside the run's own
_Z = 1.959964  # 95 %


def wilson(successes: int, num: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson, 1927); (0, 1) for no trials."""
    if num == 0:
        return 0.0, 1.0
    share, square = successes / num, _Z**2 / num
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / num + square / num / 4)
    return round(max(0.0, middle - half), 6), round(min(1.0, middle + half), 6)


def score_run(episodes: Sequence[Mapping[str, Any]], stages: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """episodes: what rollout.play reports. stages: task -> names of its stages, in order.

    Faulted episodes say nothing of the policy: they are counted and left out of every rate.
    """
    tasks = {task: _score_task([e for e in episodes if e["task"] == task], stages[task]) for task in stages}
    return {
        "success_rate": {task: score["success"]["rate"] for task, score in tasks.items()},
        "success_rate_70": {task: score["success_70"]["rate"] for task, score in tasks.items()},
        "episodes": len(episodes),
        "faulted": sum(score["faulted"] for score in tasks.values()),
        "tasks": tasks,
    }


def _score_task(episodes: list[Mapping[str, Any]], stages: Sequence[str]) -> dict[str, Any]:
    played = [episode for episode in episodes if episode["outcome"] != "faulted"]
    won = [episode for episode in played if episode["outcome"] == "success"]
    efficiencies = [episode["oracle_steps"] / episode["steps"] for episode in won if episode["oracle_steps"]]
    floor = [episode["random_steps"] for episode in played if "random_steps" in episode]
    num_steps = sum(episode["steps"] for episode in played)
    return {
        "episodes": len(episodes),
        "faulted": len(episodes) - len(played),
        "success": _rate(len(won), len(played)),
        "success_70": _rate(sum(episode["steps"] <= AUTOEVAL_STEPS for episode in won), len(played)),
        "oracle": _rate(sum(episode["oracle_steps"] is not None for episode in played), len(played)),
        "random": _rate(sum(steps is not None for steps in floor), len(floor)),
        "steps": _mean([episode["steps"] for episode in won]),
        "oracle_steps": _mean([episode["oracle_steps"] for episode in won if episode["oracle_steps"]]),
        # The step ratio: each episode's share is cut at 1, so that a lucky one makes up for no slow one.
        "efficiency": _mean([min(1.0, efficiency) for efficiency in efficiencies]),
        "agreement": sum(episode["agreed"] for episode in played) / num_steps if num_steps else None,
        "reached": {name: sum(e["stage"] > index for e in played) for index, name in enumerate(stages)},
        "lost": sum(episode["outcome"] == "lost" for episode in played),
    }


def _rate(successes: int, num: int) -> dict[str, Any]:
    return {"rate": successes / num if num else None, "interval": wilson(successes, num), "count": successes, "n": num}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
