"""Success in the closed loop, predicted from a policy's confusion matrices.

The oracle plays, and each axis of its phrase is replaced by a draw from that axis' confusion matrix. Nothing is
fitted. Matrices of single axes do not say how errors coincide, so they are drawn in three ways
(error_models.ConfusionErrors): each axis by itself in every step, all axes in the same steps, and the same again
at the same place.
"""

import json
import zlib
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.environments import OURS
from vlm_local.errors import ConfigError, DataError
from vlm_local.files import read_json_object, write_json
from vlm_local.lab.ceiling.confusion_matrices import ANY_TASK, ConfusionMatrices, load_confusion_matrices
from vlm_local.lab.ceiling.episodes import open_players
from vlm_local.lab.ceiling.error_models import DRAWS
from vlm_local.lab.ceiling.play import play_confused
from vlm_local.lab.results import find_layout
from vlm_local.lab.statistics import wilson
from vlm_local.provenance import choose_deciding, list_differences
from vlm_local.sim.tasks import AUTOEVAL_STEPS

_GROUP = 5  # episodes that share a draw of the confusion matrices


def predict(folder: Path, source: Path, result: Path, seeds: range, workers: int, progress) -> dict[str, Any]:
    """Predict `result` (of `sim`) from the answers in `source`; into folder/predictions, and returned.

    seeds: of the episodes to play. The same from the same answers is not played again. progress: is called
    with the number of episodes that were played. Raises DataError for folders that are no such results,
    ConfigError where they have no task in common.
    """
    confusions, observed = load_confusion_matrices(source), load_observed(result)
    _refuse_another_policy(source, result)
    tasks = [task for task in observed["tasks"] if task in confusions.counts or ANY_TASK in confusions.counts]
    if not tasks:
        raise ConfigError(f"{source} has answers for {', '.join(confusions.counts)}, {result} for other tasks")
    said = {
        "source": source.name,
        "kind": confusions.kind,
        "observed": result.name,
        "policy": observed["policy"],
        "level": observed["level"],
        "episodes": len(seeds),
        "seed": seeds[0],
        "counts": {task: _find_counts(confusions, task).sum(axis=0).tolist() for task in tasks},
        "truth": {task: observed["tasks"][task] for task in tasks},
    }
    path = folder / "predictions" / f"{result.name}-from-{source.name}.json"
    if path.exists() and said.items() <= (there := json.loads(path.read_bytes())).items():
        progress(len(DRAWS) * len(tasks) * len(seeds))
        return there
    won = _play(confusions, tasks, observed["level"], seeds, workers, progress)
    prediction = {**said, **score_predictions(won, said["truth"])}
    write_json(path, prediction)
    return prediction


def _play(confusions, tasks, level: str, seeds: range, workers: int, progress) -> dict[str, dict[str, list[bool]]]:
    """Task -> way to draw -> success of each episode within AUTOEVAL_STEPS."""
    drawn = {task: _draw_counts(_find_counts(confusions, task), task, seeds) for task in tasks}
    jobs = [
        (task, level, seed, drawn[task][index], draw, AUTOEVAL_STEPS)
        for task, draw in product(tasks, DRAWS)
        for index, seed in enumerate(seeds)
    ]
    won: dict[str, dict[str, list[bool]]] = {task: {draw: [] for draw in DRAWS} for task in tasks}
    with open_players(workers) as play:
        for (task, *_, draw, _), took in zip(jobs, play(play_confused, *zip(*jobs, strict=True)), strict=True):
            won[task][draw].append(took is not None)
            progress(1)
    return won


def load_observed(result: Path) -> dict[str, Any]:
    """policy, level, and task -> {rate, interval, count, n} of success within AUTOEVAL_STEPS, of `sim`'s report."""
    if find_layout(result).kind != "sim":
        raise DataError(f"{result} is no result of `sim`; success in the closed loop is what is predicted")
    report = json.loads((result / "report.json").read_bytes())
    plan = report["simulator"]
    if plan.get("env", OURS) != OURS or plan["max_steps"] < AUTOEVAL_STEPS:
        raise ConfigError(
            f"{result} has at most {plan['max_steps']} steps in {plan.get('env', OURS)}; success within "
            f"{AUTOEVAL_STEPS} in our simulator is predicted"
        )
    tasks = {task: line["success_70"] for task, line in report["tasks"].items() if line["success_70"]["n"]}
    return {"policy": plan["policy"], "level": plan["level"], "tasks": tasks}


def _refuse_another_policy(source: Path, result: Path) -> None:
    """What both tell of their policy must be the same, else ConfigError. A server of others tells nothing."""
    counted, played = map(_list_settings, (source, result))
    both = counted.keys() & played.keys()
    differing = list(list_differences({name: counted[name] for name in both}, {name: played[name] for name in both}))
    if differing:
        raise ConfigError(
            f"{source} has the answers of another policy than {result} played: {'; '.join(sorted(differing))}"
        )


def _list_settings(folder: Path) -> dict[str, Any]:
    report = read_json_object(folder / "report.json")
    plan = report.get("simulator", {})
    done = {"noise": plan.get("noise", 0.0), "control": plan.get("control", "none")}
    return {**choose_deciding(report.get("policy", report)), **done}


def _find_counts(confusions: ConfusionMatrices, task: str) -> np.ndarray:
    return confusions.counts[task if task in confusions.counts else ANY_TASK]


def _draw_counts(counts: np.ndarray, task: str, seeds: range) -> list[np.ndarray]:
    """Int (6, 3, 3) of each episode: each group of them has another draw of the recorded episodes."""
    random = np.random.default_rng([seeds[0], zlib.crc32(task.encode())])
    drawn: list[np.ndarray] = []
    for _ in range(0, len(seeds), _GROUP):
        weights = np.bincount(random.integers(0, len(counts), len(counts)), minlength=len(counts))
        drawn += [np.tensordot(weights, counts, axes=1)] * _GROUP
    return drawn[: len(seeds)]


def score_predictions(
    won: Mapping[str, Mapping[str, list[bool]]], truth: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """won: task -> way to draw -> success of each episode. truth: task -> {rate}, observed.

    Returns "predicted" (task -> way to draw -> `estimate`), "errors" (way to draw -> task -> difference of rates) and
    "mean_error" (way to draw -> mean over tasks).
    """
    predicted = {task: {draw: estimate(ways[draw]) for draw in DRAWS} for task, ways in won.items()}
    errors = {
        draw: {task: abs(ways[draw]["rate"] - truth[task]["rate"]) for task, ways in predicted.items()}
        for draw in DRAWS
    }
    means = {draw: float(np.mean(list(by_task.values()))) for draw, by_task in errors.items()}
    return {"predicted": predicted, "errors": errors, "mean_error": means}


def estimate(won: list[bool]) -> dict[str, Any]:
    """Success rate with a 95 % interval that covers both the chance of the episodes and that of the recorded answers.

    won: success of each episode, in groups of _GROUP with the same confusion matrices. Variance between the groups
    beyond that of equal success rates comes from the matrices; Wilson's interval is taken for as many episodes as
    would have the sum of both variances.
    """
    rate, num = float(np.mean(won)), len(won)
    groups = [np.mean(won[start : start + _GROUP]) for start in range(0, num, _GROUP)]
    chance = rate * (1 - rate)
    between = max(0.0, float(np.var(groups, ddof=1)) - chance / _GROUP) if len(groups) > 1 else 0.0
    enough = num if not chance else chance / (chance / num + between)
    interval = [round(edge, 6) for edge in wilson(rate * enough, enough)]
    return {"rate": rate, "interval": interval, "n": num}
