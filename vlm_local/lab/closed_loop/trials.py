"""The episodes of a run in the simulator, to be compared with those of others from the same seeds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.environments import OURS, name_episode
from vlm_local.errors import DataError
from vlm_local.lab.closed_loop.scores import reaches_autoeval
from vlm_local.lab.comparison import Measure, Trials, describe_making, read_report, stack_scores
from vlm_local.provenance import HOW_MADE
from vlm_local.sim.tasks import AUTOEVAL_STEPS

DECISION = "decision.json"  # of --until-separated, beside both results
# Whoever stops when a difference is seen sees one too often by tests for a number chosen beforehand.
_UNTIL_SEPARATED = f"until separated, so that p and intervals here do not hold and those of {DECISION} do"
_SOON = f"within {AUTOEVAL_STEPS}"


def load_trials(folder: Path) -> Trials:
    """folder: the --out of `sim`. Raises DataError for one of which no episode was played to its end.

    Scores: "success", the same within AutoEval's limit of steps where that is known, "progress": the share of the
    task's stages that was reached, and the success of each task. Faulted episodes say nothing of the policy and are no
    trials.
    """
    report = read_report(folder)
    plan = report["simulator"]
    played = _read_outcomes(folder, plan)
    episodes = [episode for episode in played if episode["outcome"] != "faulted"]
    if not episodes:
        raise DataError(f"{folder}: no episode was played without a fault")
    tasks = plan["tasks"] if len(plan["tasks"]) > 1 else []
    stages = {task: len(score["reached"]) for task, score in report["tasks"].items()}
    keys = [f"{episode['task']}, seed {episode['seed']}" for episode in episodes]
    return Trials(
        kind="sim",
        noun="episode",
        truth_noun="scene",
        settings={"env": plan.get("env", OURS), "level": plan["level"], "max_steps": plan["max_steps"]},
        about=describe_making(report, _describe_policy(report)),
        measures=(
            Measure("success"),
            *[Measure(_SOON)] * reaches_autoeval(plan),
            Measure("progress"),
            *(Measure(task, "task") for task in tasks),
        ),
        keys=keys,
        units=np.array(keys),
        truths=[f"{episode['instruction']}, {episode['oracle_steps']} oracle steps" for episode in episodes],
        scores=_score(episodes, stages, tasks),
        conditions={
            "noise": plan["noise"] or None,
            "control": None if plan["control"] == "none" else plan["control"],
            "played": _UNTIL_SEPARATED if (folder.parent / DECISION).is_file() else None,
        },
        left_out=len(played) - len(episodes),
    )


def _read_outcomes(folder: Path, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    places = [
        folder / "episodes" / name_episode(task, number) for task in plan["tasks"] for number in range(plan["episodes"])
    ]
    try:
        metas = [json.loads((place / "meta.json").read_bytes()) for place in places if place.is_dir()]
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: an episode's meta.json cannot be read ({error})") from None
    return [meta for meta in metas if "outcome" in meta]


def _describe_policy(report: Mapping[str, Any]) -> dict[str, Any]:
    """The policy as the user named it, what it says of itself, and what was done to it."""
    scored = ("success_rate", "success_rate_70", "episodes", "faulted", "tasks", "simulator")
    told = {name: value for name, value in report.items() if name not in scored + HOW_MADE}
    plan = report["simulator"]
    return {"name": plan["policy"], **told, "noise": plan["noise"], "control": plan["control"]}


def _score(episodes: Sequence[Mapping], stages: Mapping[str, int], tasks: Sequence[str]) -> dict[str, np.ndarray]:
    won = np.array([episode["outcome"] == "success" for episode in episodes])
    soon = np.array([episode["steps"] <= AUTOEVAL_STEPS for episode in episodes])
    progress = [min(episode["stage"] / stages[episode["task"]], 1.0) for episode in episodes]
    played = np.array([episode["task"] for episode in episodes])
    always = np.ones(len(episodes))
    columns = {"success": (won, always), _SOON: (won & soon, always), "progress": (progress, always)}
    columns |= {task: (won & (played == task), played == task) for task in tasks}
    return stack_scores(columns)
