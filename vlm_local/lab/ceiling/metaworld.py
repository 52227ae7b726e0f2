"""How much of Meta-World can be said in phrases: its experts spoken in phrases, by step size, hold and grip effort."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vlm_local.actions import StepTable
from vlm_local.environments import METAWORLD, Outcome
from vlm_local.lab.ceiling.benchmarks import (
    PHRASES,
    RANDOM,
    Benchmark,
    Rates,
    Steps,
    draw_levels,
    draw_line,
    mean,
    score_settings,
)
from vlm_local.lab.pages import BLUE, GREEN, styled

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


def _prepare(env: Any, setting: Setting) -> StepTable:
    env.configure(setting.effort, setting.scale, setting.hold)
    step_m = setting.scale * _STEP_M
    return StepTable(step_m, step_m, step_m)


def _step_as_expert(env: Any) -> Outcome:
    return env.step_raw(env.expert_action)


def _score(steps: Steps, tasks: Sequence[str]) -> dict[str, Any]:
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
def _draw(rates: Rates) -> Figure:
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
        draw_levels(panel, rates, {EXPERT: "experts", RANDOM: "random phrases"})
    return figure


METAWORLD_STUDY = Benchmark(METAWORLD, ALL_SETTINGS, EXPERT, _step_as_expert, _prepare, _score, _draw)
