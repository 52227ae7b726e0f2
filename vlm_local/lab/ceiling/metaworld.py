"""How much of Meta-World can be said in phrases: its experts spoken in phrases, by step size, hold and grip effort.

Every setting plays the same episodes, without pictures. `run_metaworld_study` writes rows.jsonl, report.json,
tables.md and curves.png; the same command goes on where it was stopped.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vlm_local.actions import GripperLatch, StepTable, build_action
from vlm_local.environments import METAWORLD, find_suite
from vlm_local.files import write_json
from vlm_local.grammar import load_phrase_grammar
from vlm_local.lab.ceiling.curves import save_png
from vlm_local.lab.ceiling.episodes import SETTINGS, CeilingPlan, Episodes, list_made_with
from vlm_local.lab.pages import BLUE, GREEN, GREY, styled, write_page
from vlm_local.lab.results import ResultFolder
from vlm_local.lab.statistics import describe_rate
from vlm_local.policy import draw_uniform
from vlm_local.primitives import parse_phrase
from vlm_local.progress import open_bar
from vlm_local.types import Primitive

PHRASES, EXPERT, RANDOM = "phrases", "expert", "random"
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

Steps = Mapping[tuple[str, Setting], Sequence[int | None]]


def run_metaworld_study(path: Path, plan: CeilingPlan, workers: int) -> dict[str, Any]:
    """Play what is missing in the folder and write its pages; returns the report."""
    with (
        ResultFolder(path, "ceiling", SETTINGS) as folder,
        closing(Episodes(folder, plan, ALL_SETTINGS, play_row)) as episodes,
    ):
        missing = episodes.find_missing()
        with open_bar("metaworld", len(missing), "episode") as bar:
            episodes.play(missing, workers, bar.update)
        report = {"plan": asdict(plan), **score(episodes.collect(), plan.tasks), **list_made_with(folder.settings)}
        report["predictions"] = []
        _write_pages(path, report)
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
    step_m = setting.scale * _STEP_M
    table, latch, phrases = StepTable(step_m, step_m, step_m), GripperLatch(), load_phrase_grammar().sentences
    said = Primitive()
    for step in range(find_suite(METAWORLD).max_steps):
        if setting.speaker == EXPERT:
            outcome = env.step_raw(env.expert_action)
        else:
            if setting.speaker == RANDOM:
                said = parse_phrase(phrases[int(draw_uniform(seed, step) * len(phrases))])
            elif step % setting.hold == 0:
                said = env.ask_oracle()
            command = latch.update(said.gripper, env.observation.opening)
            outcome = env.step(build_action(said, command, table))
        if outcome.success:
            return step + 1
    return None


def score(steps: Steps, tasks: Sequence[str]) -> dict[str, Any]:
    """Rates by setting and task, the best setting of each task, and why the common one falls short."""
    played = {key: [took for took in of if took != 0] for key, of in steps.items()}
    won = {key: np.array([took is not None for took in of]) for key, of in played.items()}
    settings = [
        {
            "name": setting.name,
            **asdict(setting),
            "success": describe_rate(*_count([won[t, setting] for t in tasks])),
            "steps": _mean([took for t in tasks for took in played[t, setting] if took is not None]),
            "tasks": {t: _mean(won[t, setting].tolist()) for t in tasks},
        }
        for setting in ALL_SETTINGS
    ]
    spoken = [setting for setting in ALL_SETTINGS if setting.speaker == PHRASES and setting.every == 1]
    best = {task: max(spoken, key=lambda s: (won[task, s].mean(), s == COMMON)) for task in tasks}
    rates = {s["name"]: s["tasks"] for s in settings}
    return {
        "settings": settings,
        "best": {
            "tasks": {task: {"name": best[task].name, "rate": rates[best[task].name][task]} for task in tasks},
            "rate": _mean([rates[best[task].name][task] for task in tasks]),
            "rate_on_others": _mean([_score_choice([won[task, s] for s in spoken]) for task in tasks]),
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


def _count(won: Sequence[np.ndarray]) -> tuple[int, int]:
    """Successes and episodes."""
    return int(sum(each.sum() for each in won)), sum(each.size for each in won)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _write_pages(path: Path, report: Mapping[str, Any]) -> None:
    write_json(path / "report.json", report)
    rates = {setting["name"]: setting for setting in report["settings"]}
    save_png(_draw(rates), path / "curves.png")
    values = {"plan": report["plan"], "rates": rates, "common": COMMON.name, "expert": EXPERT, "random": RANDOM}
    write_page(path / "tables.md", "ceiling/metaworld.md.txt", report, made=("plan",), **values)


@styled
def _draw(rates: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Mean success over tasks by hold and step size, and by effort."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for line, colour, label in ((HOLDS, BLUE, "10 mm"), (HALVES, GREEN, "5 mm")):
        _draw_line(left, [s.hold for s in line], [rates[s.name]["success"] for s in line], colour, label)
    left.set(xlabel="control steps a phrase is held", ylabel="success, mean over tasks", ylim=(0, 1.03))
    left.set_xticks([s.hold for s in HOLDS])
    _draw_line(right, [s.effort for s in EFFORTS], [rates[s.name]["success"] for s in EFFORTS], BLUE, "10 mm")
    right.set(xlabel='grip effort of "close gripper"')
    for panel in (left, right):
        for speaker, style, label in ((EXPERT, "--", "experts"), (RANDOM, ":", "random phrases")):
            if rates[speaker]["success"]["n"]:
                panel.axhline(rates[speaker]["success"]["rate"], color=GREY, linestyle=style, label=label)
        panel.legend(frameon=False, loc="center right", fontsize=8)
    return figure


def _draw_line(panel, xs: Sequence[float], rates: Sequence[Mapping[str, Any]], colour: str, label: str) -> None:
    played = [(x, rate["rate"], *rate["interval"]) for x, rate in zip(xs, rates, strict=True) if rate["n"]]
    if played:
        places, shares, low, high = np.array(played).T
        panel.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.plot(places, shares, "o-", color=colour, markersize=4, label=label)
