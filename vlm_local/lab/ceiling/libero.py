"""How much of two suites of LIBERO can be said: an oracle in phrases, by step size and hold, and in numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from vlm_local.actions import STEP_M, StepTable
from vlm_local.environments import LIBERO, Outcome
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
from vlm_local.lab.ceiling.play import scale_steps
from vlm_local.lab.pages import BLUE, GREEN, styled

NUMBERS = "oracle in numbers"


@dataclass(frozen=True)
class Setting:
    """speaker: PHRASES, NUMBERS (the same oracle, any step up to a phrase's) or RANDOM (phrases).

    scale: step size in 0.0125 m and 0.125 rad. hold: control steps a phrase is kept. every: only seeds that this
    divides.
    """

    speaker: str = PHRASES
    scale: float = 1.0
    hold: int = 1
    every: int = 1

    @property
    def name(self) -> str:
        return f"{1000 * STEP_M * self.scale:g} mm, held {self.hold}" if self.speaker == PHRASES else self.speaker


COMMON = Setting()
_RARE = replace(COMMON, every=5)
FULL = (COMMON, replace(_RARE, hold=2))
HALF = (replace(_RARE, scale=0.5), replace(_RARE, scale=0.5, hold=2))
QUARTER = (replace(_RARE, scale=0.25, hold=4),)
IN_NUMBERS = Setting(NUMBERS, every=5)
ALL_SETTINGS = (*FULL, *HALF, *QUARTER, IN_NUMBERS, Setting(RANDOM, every=5))


def prepare(env: Any, setting: Setting) -> StepTable:
    env.configure(setting.scale, setting.hold)
    return scale_steps(setting.scale)


def step_in_numbers(env: Any) -> Outcome:
    return env.step(env.oracle_action)


def _score(steps: Steps, tasks: Sequence[str]) -> dict[str, Any]:
    """Rates by setting, suite and task, and why COMMON falls short of some tasks."""
    settings, _ = score_settings(steps, tasks, ALL_SETTINGS)
    rates = {setting["name"]: setting["tasks"] for setting in settings}
    suites = {}
    for suite in dict.fromkeys(task.partition("/")[0] for task in tasks):
        inside = [task for task in tasks if task.startswith(f"{suite}/")]
        suites[suite] = {name: mean([r for t in inside if (r := of[t]) is not None]) for name, of in rates.items()}
    short = [_explain(task, steps) for task in tasks if (rates[COMMON.name][task] or 0) < 1]
    for line in short:
        line |= {"common": rates[COMMON.name][line["task"]], "numbers": rates[NUMBERS][line["task"]]}
    return {"settings": settings, "suites": suites, "short": short}


def _explain(task: str, steps: Steps) -> dict[str, Any]:
    """What the oracle in numbers says about the episodes in which COMMON failed."""
    pairs = zip(steps[task, COMMON], steps[task, IN_NUMBERS], strict=True)
    told = [numbers is not None for common, numbers in pairs if common is None and numbers != 0]
    if not told:
        why = "not told apart: the episode was not played in numbers"
    else:
        why = "the phrases" if all(told) else "the oracle, which fails in numbers, too"
    return {"task": task, "why": why}


@styled
def draw_by_hold(rates: Rates, lines: Mapping[str, Sequence[Setting]], holds: Sequence[int]) -> Figure:
    """Success by hold and step size, over all tasks. lines: at most three, by the step size in words."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    panel = figure.subplots()
    for (label, line), colour in zip(lines.items(), (BLUE, GREEN, "black"), strict=True):
        draw_line(panel, [s.hold for s in line], [rates[s.name]["success"] for s in line], colour, label)
    panel.set(xlabel="control steps a phrase is held", ylabel="success", ylim=(-0.03, 1.03))
    panel.set_xticks(holds)
    draw_levels(panel, rates, {NUMBERS: NUMBERS, RANDOM: RANDOM})
    return figure


def _draw(rates: Rates) -> Figure:
    return draw_by_hold(rates, {"12.5 mm": FULL, "6.25 mm": HALF, "3.125 mm": QUARTER}, holds=[1, 2, 4])


LIBERO_STUDY = Benchmark(LIBERO, ALL_SETTINGS, NUMBERS, step_in_numbers, prepare, _score, _draw)
