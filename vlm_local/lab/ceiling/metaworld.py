"""How much of Meta-World can be said in phrases: its experts spoken in phrases, by step size, hold and grip effort.

Every setting plays the same episodes, without pictures. `run_metaworld_study` writes rows.jsonl, report.json,
tables.md and curves.png; the same command goes on where it was stopped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vlm_local.actions import StepTable
from vlm_local.environments import METAWORLD, find_suite
from vlm_local.lab.ceiling.benchmarks import (
    PHRASES,
    RANDOM,
    Steps,
    count_steps,
    draw_line,
    mean,
    run_benchmark,
    score_settings,
    speak,
    write_tables,
)
from vlm_local.lab.ceiling.curves import save_png
from vlm_local.lab.ceiling.episodes import CeilingPlan
from vlm_local.lab.pages import BLUE, GREEN, GREY, styled

EXPERT = "expert"
_STEP_M = 0.01
_ALIKE = 0.1  # of a success rate, over ten episodes: less is not called a difference


@dataclass(frozen=True)
class Setting:
    """speaker: PHRASES (the expert in phrases), EXPERT (Meta-World's own actions) or RANDOM (phrases).

    scale: step size in 0.01 m, Meta-World's largest. hold: control steps a phrase is kept. effort: of a closed gripper.
    every: only seeds that this divides are played, as failures take 500 steps.
    """

    speaker: str = PHRASES
    scale: float = 1.0
    hold: int = 1
    effort: float = 0.6
    every: int = 1

    @property
    def name(self) -> str:
        if self.speaker != PHRASES:
            return self.speaker
        return f"{10 * self.scale:g} mm, held {self.hold}, effort {self.effort:g}"


COMMON = Setting()
_RARE = replace(COMMON, every=5)
HOLDS = (COMMON, replace(_RARE, hold=2), replace(_RARE, hold=4))
HALVES = (replace(_RARE, scale=0.5), replace(_RARE, scale=0.5, hold=4))
EFFORTS = (replace(COMMON, effort=0.4), COMMON, replace(COMMON, effort=0.8), replace(_RARE, effort=1.0))
ALL_SETTINGS = tuple(dict.fromkeys([COMMON, Setting(EXPERT), *HOLDS, *HALVES, *EFFORTS, Setting(RANDOM, every=5)]))


def run_metaworld_study(path: Path, plan: CeilingPlan, workers: int) -> dict[str, Any]:
    """Play what is missing in the folder and write its pages; returns the report."""
    report = run_benchmark(path, plan, workers, ALL_SETTINGS, play_row, score)
    rates = {setting["name"]: setting for setting in report["settings"]}
    save_png(_draw(rates), path / "curves.png")
    write_tables(path, report, "ceiling/metaworld.md.txt", common=COMMON.name, expert=EXPERT, random=RANDOM)
    return report


def play_row(task: str, level: str, seed: int, settings: Sequence[Setting]) -> list[int | None]:
    """Control steps to success of one episode under each setting, None where it fails, 0 where it is not played."""
    return [0 if seed % setting.every else _play(_open(task), seed, setting) for setting in settings]


@lru_cache(maxsize=1)
def _open(task: str):
    return find_suite(METAWORLD).open(task, "normal", None)


def _play(env, seed: int, setting: Setting) -> int | None:
    env.configure(setting.effort, setting.scale, setting.hold)
    env.reset(seed)
    max_steps = find_suite(METAWORLD).max_steps
    if setting.speaker == EXPERT:
        return count_steps(lambda _: env.step_raw(env.expert_action), max_steps)
    step_m = setting.scale * _STEP_M
    return count_steps(speak(env, seed, setting, StepTable(step_m, step_m, step_m)), max_steps)


def score(steps: Steps, tasks: Sequence[str]) -> dict[str, Any]:
    """Rates by setting and task, the best setting of each task, and why the common one falls short."""
    settings, won = score_settings(steps, tasks, ALL_SETTINGS)
    spoken = [setting for setting in ALL_SETTINGS if setting.speaker == PHRASES and setting.every == 1]
    best = {task: max(spoken, key=lambda s: (won[task, s].mean(), s == COMMON)) for task in tasks}
    rates = {s["name"]: s["tasks"] for s in settings}
    return {
        "settings": settings,
        "best": {
            "tasks": {task: {"name": best[task].name, "rate": rates[best[task].name][task]} for task in tasks},
            "rate": mean([rates[best[task].name][task] for task in tasks]),
            "rate_on_others": mean([_score_choice([won[task, s] for s in spoken]) for task in tasks]),
        },
        "short": [_explain(task, rates) for task in tasks if rates[COMMON.name][task] < 1],
    }


def _score_choice(won: Sequence[np.ndarray]) -> float:
    """Success of the setting that was best on the other half of the episodes, COMMON first where it is as good."""
    rows = np.stack(won)  # (settings, episodes)
    if rows.shape[1] < 2:
        return float(rows[0].mean())
    halves = rows[:, 0::2], rows[:, 1::2]
    sums = [there[here.mean(axis=1).argmax()].sum() for here, there in (halves, halves[::-1])]
    return float(sum(sums) / rows.shape[1])


def _explain(task: str, rates: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What the other settings say about a task that COMMON does not always do."""
    common, expert = rates[COMMON.name][task], rates[EXPERT][task]
    effort = max((s for s in EFFORTS if s != COMMON and s.every == 1), key=lambda s: rates[s.name][task])
    if rates[effort.name][task] >= common + _ALIKE - 1e-9:
        why = f"grip: with effort {effort.effort:g} it is {100 * rates[effort.name][task]:.0f} %"
    elif expert <= common + 1e-9:
        why = "the expert itself fails as often"
    else:
        why = "the phrases, not the grip: no other effort that was played does better"
    return {"task": task, "common": common, "expert": expert, "why": why}


@styled
def _draw(rates: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Mean success over tasks by hold and step size, and by effort."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for line, colour, label in ((HOLDS, BLUE, "10 mm"), (HALVES, GREEN, "5 mm")):
        draw_line(left, [s.hold for s in line], [rates[s.name]["success"] for s in line], colour, label)
    left.set(xlabel="control steps a phrase is held", ylabel="success, mean over tasks", ylim=(0, 1.03))
    left.set_xticks([s.hold for s in HOLDS])
    draw_line(right, [s.effort for s in EFFORTS], [rates[s.name]["success"] for s in EFFORTS], BLUE, "10 mm")
    right.set(xlabel='grip effort of "close gripper"')
    for panel in (left, right):
        for speaker, style, label in ((EXPERT, "--", "experts"), (RANDOM, ":", "random phrases")):
            if rates[speaker]["success"]["n"]:
                panel.axhline(rates[speaker]["success"]["rate"], color=GREY, linestyle=style, label=label)
        panel.legend(frameon=False, loc="center right", fontsize=8)
    return figure
