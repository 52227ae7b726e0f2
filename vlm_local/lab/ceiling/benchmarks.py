"""What the studies of other people's benchmarks share: playing in phrases, going on, rates by setting and task.

Every setting plays the same episodes, without pictures. A setting is a dataclass with `name`, `speaker`, `hold` and
`every`; one whose `every` does not divide a seed is not played on it. A study writes rows.jsonl, report.json, tables.md
and curves.png; the same command goes on where it was stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vlm_local.actions import GripperLatch, StepTable, build_action
from vlm_local.environments import Outcome, TaskEnvironment, find_suite
from vlm_local.files import write_json
from vlm_local.grammar import load_phrase_grammar
from vlm_local.lab.ceiling.curves import save_png
from vlm_local.lab.ceiling.episodes import SETTINGS, CeilingPlan, Episodes, list_made_with
from vlm_local.lab.pages import GREY, write_page
from vlm_local.lab.results import ResultFolder
from vlm_local.lab.statistics import describe_rate
from vlm_local.policy import draw_phrase
from vlm_local.primitives import parse_phrase
from vlm_local.types import Primitive

PHRASES, RANDOM = "phrases", "random"

Steps = Mapping[tuple[str, Any], Sequence[int | None]]
Rates = Mapping[str, Mapping[str, Any]]  # the report's settings, by name


@dataclass(frozen=True)
class Benchmark:
    """A study of one environment.

    settings: the common one first. expert: the speaker of actions that are no phrases. step_expert: a control step of
    it. prepare: sets an environment up for a setting, and gives its table of step sizes. score: what the report says
    of the steps. draw: curves.png.
    """

    env: str
    settings: Sequence[Any]
    expert: str
    step_expert: Callable[[Any], Outcome]
    prepare: Callable[[Any, Any], StepTable]
    score: Callable[[Steps, Sequence[str]], dict[str, Any]]
    draw: Callable[[Rates], Figure]


def run_benchmark(benchmark: Benchmark, path: Path, plan: CeilingPlan, workers: int) -> dict[str, Any]:
    """Play what is missing in the folder and write its pages; returns the report, which is written there, too."""
    with (
        ResultFolder(path, "ceiling", SETTINGS) as folder,
        closing(Episodes(folder, plan, benchmark.settings, partial(_play_row, benchmark))) as episodes,
    ):
        episodes.play_missing(plan.env, workers)
        scores = benchmark.score(episodes.collect(), plan.tasks)
        report = {"plan": asdict(plan), **scores, **list_made_with(folder.settings), "predictions": []}
        write_json(path / "report.json", report)
    rates = {setting["name"]: setting for setting in report["settings"]}
    save_png(benchmark.draw(rates), path / "curves.png")
    speakers = {"common": benchmark.settings[0].name, "expert": benchmark.expert, "random": RANDOM}
    template = f"ceiling/{benchmark.env}.md.txt"
    write_page(path / "tables.md", template, report, made=("plan",), plan=report["plan"], rates=rates, **speakers)
    return report


def _play_row(benchmark: Benchmark, task: str, level: str, seed: int, settings: Sequence[Any]) -> list[int | None]:
    """Control steps to success of one episode under each setting, None where it fails, 0 where it is not played."""
    return [0 if seed % setting.every else _play(benchmark, task, seed, setting) for setting in settings]


def _play(benchmark: Benchmark, task: str, seed: int, setting: Any) -> int | None:
    env = _open(benchmark.env, task)
    table = benchmark.prepare(env, setting)
    env.reset(seed)
    is_expert = setting.speaker == benchmark.expert
    step = (lambda _: benchmark.step_expert(env)) if is_expert else _speak(env, seed, setting, table)
    for number in range(find_suite(benchmark.env).max_steps):
        outcome = step(number)
        if outcome.success or outcome.lost:
            return number + 1 if outcome.success else None
    return None


@lru_cache(maxsize=1)
def _open(env: str, task: str) -> Any:
    return find_suite(env).open(task, "normal", None)


def _speak(env: TaskEnvironment, seed: int, setting: Any, table: StepTable) -> Callable[[int], Outcome]:
    """Control steps with the oracle's or random phrases, each kept for setting.hold steps."""
    latch, phrases = GripperLatch(), load_phrase_grammar().sentences
    said = Primitive()

    def step(number: int) -> Outcome:
        nonlocal said
        if setting.speaker == RANDOM:
            said = parse_phrase(draw_phrase(phrases, seed, number))
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


def draw_levels(panel, rates: Rates, labels: Mapping[str, str]) -> None:
    """Lines across for speakers that do not depend on the horizontal axis, and the legend. labels: speaker -> words."""
    for (speaker, label), style in zip(labels.items(), ("--", ":"), strict=True):
        if rates[speaker]["success"]["n"]:
            panel.axhline(rates[speaker]["success"]["rate"], color=GREY, linestyle=style, label=label)
    panel.legend(frameon=False, loc="center right", fontsize=8)


def _count(won: Sequence[np.ndarray]) -> tuple[int, int]:
    """Successes and episodes."""
    return int(sum(each.sum() for each in won)), sum(each.size for each in won)
