"""Outcomes of episodes -> success rates with intervals, steps, step ratio, and where it failed."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_local.environments import OURS
from vlm_local.lab.statistics import describe_rate
from vlm_local.sim.tasks import AUTOEVAL_STEPS


def score_run(episodes: Sequence[Mapping[str, Any]], stages: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """episodes: of each that was played its meta.json. stages: task -> names of its stages, in order.

    Returns JSON values. Faulted episodes say nothing of the policy: they are counted and left out of every rate.
    """
    tasks = {task: _score_task([e for e in episodes if e["task"] == task], stages[task]) for task in stages}
    return {
        "success_rate": {task: score["success"]["rate"] for task, score in tasks.items()},
        "success_rate_70": {task: score["success_70"]["rate"] for task, score in tasks.items()},
        "episodes": len(episodes),
        "faulted": sum(score["faulted"] for score in tasks.values()),
        "tasks": tasks,
    }


def reaches_autoeval(plan: Mapping[str, Any]) -> bool:
    """Whether success within AutoEval's limit is known: its steps are ours, and so many were played.

    plan: of the run, as meta.json has it.
    """
    return plan.get("env", OURS) == OURS and plan["max_steps"] >= AUTOEVAL_STEPS


def _score_task(episodes: list[Mapping[str, Any]], stages: Sequence[str]) -> dict[str, Any]:
    played = [episode for episode in episodes if episode["outcome"] != "faulted"]
    won = [episode for episode in played if episode["outcome"] == "success"]
    efficiencies = [episode["oracle_steps"] / episode["steps"] for episode in won if episode["oracle_steps"]]
    floor = [episode["random_steps"] for episode in played if "random_steps" in episode]
    num_steps = sum(episode["steps"] for episode in played)
    return {
        "episodes": len(episodes),
        "faulted": len(episodes) - len(played),
        "success": describe_rate(len(won), len(played)),
        "success_70": describe_rate(sum(episode["steps"] <= AUTOEVAL_STEPS for episode in won), len(played)),
        "oracle": describe_rate(sum(episode["oracle_steps"] is not None for episode in played), len(played)),
        "random": describe_rate(sum(steps is not None for steps in floor), len(floor)),
        "steps": _mean([episode["steps"] for episode in won]),
        "oracle_steps": _mean([episode["oracle_steps"] for episode in won if episode["oracle_steps"]]),
        # The step ratio: each episode's share is cut at 1, so that a lucky one makes up for no slow one.
        "efficiency": _mean([min(1.0, efficiency) for efficiency in efficiencies]),
        "agreement": sum(episode["agreed"] for episode in played) / num_steps if num_steps else None,
        "reached": {name: sum(e["stage"] > index for e in played) for index, name in enumerate(stages)},
        "lost": sum(episode["outcome"] == "lost" for episode in played),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
