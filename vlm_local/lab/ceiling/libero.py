"""How much of two suites of LIBERO can be said in phrases: an oracle in phrases, by step size and hold, and in numbers.

`run_libero_study` writes rows.jsonl, report.json, tables.md and curves.png; the same command goes on where it was
stopped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vlm_local.actions import STEP_M, STEP_RAD, StepTable
from vlm_local.environments import LIBERO, find_suite
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


def run_libero_study(path: Path, plan: CeilingPlan, workers: int) -> dict[str, Any]:
    """Play what is missing in the folder and write its pages; returns the report."""
    report = run_benchmark(path, plan, workers, ALL_SETTINGS, play_row, score)
    save_png(_draw({setting["name"]: setting for setting in report["settings"]}), path / "curves.png")
    write_tables(path, report, "ceiling/libero.md.txt", common=COMMON.name, numbers=NUMBERS, random=RANDOM)
    return report


def play_row(task: str, level: str, seed: int, settings: Sequence[Setting]) -> list[int | None]:
    """Control steps to success of one episode under each setting, None where it fails, 0 where it is not played."""
    return [0 if seed % setting.every else _play(_open(task), seed, setting) for setting in settings]


@lru_cache(maxsize=1)
def _open(task: str):
    return find_suite(LIBERO).open(task, "normal", None)


def _play(env, seed: int, setting: Setting) -> int | None:
    env.configure(setting.scale, setting.hold)
    env.reset(seed)
    max_steps = find_suite(LIBERO).max_steps
    if setting.speaker == NUMBERS:
        return count_steps(lambda _: env.step(env.oracle_action), max_steps)
    metres, turn = setting.scale * STEP_M, setting.scale * STEP_RAD
    return count_steps(speak(env, seed, setting, StepTable(metres, metres, metres, turn, turn)), max_steps)


def score(steps: Steps, tasks: Sequence[str]) -> dict[str, Any]:
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
def _draw(rates: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Success by hold and step size, over all tasks."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    panel = figure.subplots()
    for line, colour, label in ((FULL, BLUE, "12.5 mm"), (HALF, GREEN, "6.25 mm"), (QUARTER, "black", "3.125 mm")):
        draw_line(panel, [s.hold for s in line], [rates[s.name]["success"] for s in line], colour, label)
    for speaker, style in ((NUMBERS, "--"), (RANDOM, ":")):
        if rates[speaker]["success"]["n"]:
            panel.axhline(rates[speaker]["success"]["rate"], color=GREY, linestyle=style, label=speaker)
    panel.set(xlabel="control steps a phrase is held", ylabel="success", ylim=(-0.03, 1.03))
    panel.set_xticks([1, 2, 4])
    panel.legend(frameon=False, loc="center right", fontsize=8)
    return figure
