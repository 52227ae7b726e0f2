"""What the studies of other people's benchmarks share: playing in phrases, going on, rates by setting and task.

Every setting plays the same episodes, without pictures. A setting is a dataclass with `name`, `speaker`, `hold` and
`every`; one whose `every` does not divide a seed is not played on it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.actions import GripperLatch, StepTable, build_action
from vlm_local.environments import Outcome, TaskEnvironment
from vlm_local.files import write_json
from vlm_local.grammar import load_phrase_grammar
from vlm_local.lab.ceiling.episodes import SETTINGS, CeilingPlan, Episodes, PlayOne, list_made_with
from vlm_local.lab.pages import write_page
from vlm_local.lab.results import ResultFolder
from vlm_local.lab.statistics import describe_rate
from vlm_local.policy import draw_uniform
from vlm_local.primitives import parse_phrase
from vlm_local.progress import open_bar
from vlm_local.types import Primitive

PHRASES, RANDOM = "phrases", "random"

Steps = Mapping[tuple[str, Any], Sequence[int | None]]


def run_benchmark(
    path: Path,
    plan: CeilingPlan,
    workers: int,
    settings: Sequence[Any],
    play_row: PlayOne,
    score: Callable[[Steps, Sequence[str]], dict[str, Any]],
) -> dict[str, Any]:
    """Play what is missing in the folder; returns the report, which is written there, too."""
    with (
        ResultFolder(path, "ceiling", SETTINGS) as folder,
        closing(Episodes(folder, plan, settings, play_row)) as episodes,
    ):
        missing = episodes.find_missing()
        with open_bar(plan.env, len(missing), "episode") as bar:
            episodes.play(missing, workers, bar.update)
        report = {"plan": asdict(plan), **score(episodes.collect(), plan.tasks), **list_made_with(folder.settings)}
        report["predictions"] = []
        write_json(path / "report.json", report)
        return report


def write_tables(path: Path, report: Mapping[str, Any], template: str, **names: str) -> None:
    """tables.md in the folder. names: of settings that the template shows apart."""
    rates = {setting["name"]: setting for setting in report["settings"]}
    write_page(path / "tables.md", template, report, made=("plan",), plan=report["plan"], rates=rates, **names)


def count_steps(step: Callable[[int], Outcome], max_steps: int) -> int | None:
    """Control steps to success of a loop that carries out one for each number, None for none."""
    for number in range(max_steps):
        if step(number).success:
            return number + 1
    return None


def speak(env: TaskEnvironment, seed: int, setting: Any, table: StepTable) -> Callable[[int], Outcome]:
    """Control steps with the oracle's or random phrases, each kept for setting.hold steps."""
    latch, phrases = GripperLatch(), load_phrase_grammar().sentences
    said = Primitive()

    def step(number: int) -> Outcome:
        nonlocal said
        if setting.speaker == RANDOM:
            said = parse_phrase(phrases[int(draw_uniform(seed, number) * len(phrases))])
        elif number % setting.hold == 0:
            said = env.ask_oracle()
        command = latch.update(said.gripper, env.observation.opening)
        return env.step(build_action(said, command, table))

    return step


def score_settings(
    steps: Steps, tasks: Sequence[str], settings: Sequence[Any]
) -> tuple[list[dict[str, Any]], dict[tuple[str, Any], np.ndarray]]:
    """Rates of each setting, over all tasks and by task; and of each task and setting which episodes were won."""
    played = {key: [took for took in of if took != 0] for key, of in steps.items()}
    won = {key: np.array([took is not None for took in of], bool) for key, of in played.items()}
    rates = [
        {
            "name": setting.name,
            **asdict(setting),
            "success": describe_rate(*_count([won[task, setting] for task in tasks])),
            "steps": mean([took for task in tasks for took in played[task, setting] if took is not None]),
            "tasks": {task: mean(won[task, setting].tolist()) for task in tasks},
        }
        for setting in settings
    ]
    return rates, won


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def draw_line(panel, xs: Sequence[float], rates: Sequence[Mapping[str, Any]], colour: str, label: str) -> None:
    """Rates with their intervals; those of nothing played are left out."""
    played = [(x, rate["rate"], *rate["interval"]) for x, rate in zip(xs, rates, strict=True) if rate["n"]]
    if played:
        places, shares, low, high = np.array(played).T
        panel.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.plot(places, shares, "o-", color=colour, markersize=4, label=label)


def _count(won: Sequence[np.ndarray]) -> tuple[int, int]:
    """Successes and episodes."""
    return int(sum(each.sum() for each in won)), sum(each.size for each in won)
