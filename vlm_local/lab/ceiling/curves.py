"""Scores -> figures: a panel for each task, lines with bands of 95 % intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vlm_local.lab.ceiling.error_models import BY_PLACE, BY_STEP, DRAWS, TOGETHER
from vlm_local.lab.ceiling.scores import LIMITS
from vlm_local.lab.ceiling.settings import ALL, MISSED, OPPOSITE, STUDIES, USUAL, WIDE
from vlm_local.lab.pages import BLACK, BLUE, GREEN, GREY, ORANGE, QUARTERS, RED, styled

_COLOURS = {
    **{USUAL: BLUE, WIDE: ORANGE},
    **{"x": BLUE, "y": "#1e9e77", "z": ORANGE, "gripper": "#9b59b6", ALL: BLACK},
}
_TASKS = (BLUE, "#67a9cf", GREEN, "#8fbf6a", "#8e44ad", "#c39bd3", ORANGE, RED)
_DRAWN = {
    BY_STEP: "each axis by itself, each step",
    TOGETHER: "all axes in the same steps",
    BY_PLACE: "the same again at the same place",
}
_COLUMNS = 4
_STEPS = {"scale": USUAL, "hold": USUAL, "latency": USUAL, MISSED: ALL, OPPOSITE: ALL}  # study -> line
_SHORT, _LONG = (f"success_{limit}" for limit in LIMITS)

Curves = Sequence[Mapping[str, Any]]


@styled
def draw_figures(curves: Curves, predictions: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Name of the figure -> figure, in the order of the page."""
    figures = {study: _draw_study(study, _select(curves, study)) for study in ("scale", "hold", "latency")}
    figures["steps"] = _draw_steps(curves)
    figures["vocabulary"] = _draw_vocabulary(_select(curves, "vocabulary")[0])
    figures |= {kind: _draw_study(kind, _select(curves, kind)) for kind in (MISSED, OPPOSITE)}
    if predictions:
        figures["predictions"] = _draw_predictions(predictions)
    return figures


@styled
def save_png(figure: Figure, path: Path) -> None:
    """For pages that cannot hold SVG, as Markdown on a website."""
    figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})


def name_task(task: str) -> str:
    return task.replace("_", " ")


def _select(curves: Curves, study: str) -> list[Mapping[str, Any]]:
    return [curve for curve in curves if curve["study"] == study]


def _draw_study(study: str, curves: Curves) -> Figure:
    """Success within 70 steps, lines with bands; dotted within 120."""
    tasks = list(curves[0]["tasks"])
    num_rows = -(-len(tasks) // _COLUMNS)
    figure = Figure(figsize=(11, 0.9 + 2.25 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, min(_COLUMNS, len(tasks)), sharex=True, sharey=True, squeeze=False)
    for panel, task in zip(grid.flat, tasks, strict=False):
        for curve in curves:
            places = _place(panel, study, curve["xs"])
            _draw_line(panel, places, curve["tasks"][task], curve["line"], 0.13 if len(curves) < 3 else 0.07)
        panel.set_title(name_task(task), fontsize=10, loc="left", color=BLACK)
        panel.set(ylim=(-0.03, 1.03))
        panel.set_yticks(*QUARTERS)
        _clean(panel)
    for panel in list(grid.flat)[len(tasks) :]:
        panel.set_visible(False)
    figure.supxlabel(STUDIES[study], fontsize=10, color=BLACK)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    dotted = Line2D([], [], color=GREY, linestyle=":", linewidth=1.2)
    figure.legend([*handles, dotted], [*labels, "within 120 steps"], frameon=False, loc="outside upper left",
                  ncols=len(labels) + 1)  # fmt: skip
    return figure


def _place(panel, study: str, xs: Sequence[float]) -> np.ndarray:
    """Where the values lie, with their ticks: factors by their logarithm, rates evenly, since most are small."""
    if study in (MISSED, OPPOSITE):
        places, names = np.arange(len(xs)), [f"{100 * x:.0f}%" for x in xs]
    else:
        places = np.log2(xs) if study == "scale" else np.array(xs)
        names = [f"{x:g}" for x in xs]
    panel.set_xticks(places, names)
    return places


def _clean(panel) -> None:
    panel.grid(axis="y", color="#e6e9ee", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(length=0)


def _draw_line(panel, places: np.ndarray, points: Sequence[Mapping[str, Any]], line: str, shade: float) -> None:
    colour = _COLOURS[line]
    low, high = np.array([point[_SHORT]["interval"] for point in points]).T
    panel.fill_between(places, low, high, color=colour, alpha=shade, linewidth=0)
    panel.plot(places, [point[_SHORT]["rate"] for point in points], "o-", color=colour, markersize=3, label=line)
    panel.plot(places, [point[_LONG]["rate"] for point in points], ":", color=colour, linewidth=1.2)


def _draw_steps(curves: Curves) -> Figure:
    """Mean control steps of successful episodes, a line a task, where at least half of the episodes succeed."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    grid = figure.subplots(2, 3, sharey=True)
    for panel, (study, line) in zip(grid.flat, _STEPS.items(), strict=False):
        curve = next(curve for curve in _select(curves, study) if curve["line"] == line)
        places = _place(panel, study, curve["xs"])
        for colour, (task, points) in zip(_TASKS, curve["tasks"].items(), strict=False):
            known = [(x, point["steps"]) for x, point in zip(places, points, strict=True)
                     if point["steps"] and point[_LONG]["rate"] >= 0.5]  # fmt: skip
            if known:
                xs = [x for x, _ in known]
                panel.fill_between(xs, *np.array([steps["interval"] for _, steps in known]).T, color=colour,
                                   alpha=0.12, linewidth=0)  # fmt: skip
                panel.plot(xs, [steps["mean"] for _, steps in known], "o-", color=colour, markersize=3,
                           label=name_task(task))  # fmt: skip
        panel.set_xlabel(STUDIES[study] + (", all axes" if line == ALL else ""))
        panel.set(ylim=(0, 110))
        _clean(panel)
    grid[-1, -1].set_axis_off()
    figure.legend(*grid[0, 0].get_legend_handles_labels(), frameon=False, loc="outside upper left", ncols=4)
    return figure


def _draw_vocabulary(curve: Mapping[str, Any]) -> Figure:
    """Bars: success within 70 steps by vocabulary, a group a task."""
    tasks = curve["tasks"]
    figure = Figure(figsize=(11, 3), layout="constrained")
    panel = figure.subplots()
    width = 0.8 / len(curve["xs"])
    for index, (size, colour) in enumerate(zip(curve["xs"], ("#b8c4d2", "#6aa5d3", BLUE), strict=True)):
        for group, points in enumerate(tasks.values()):
            place = group + (index - 1) * width
            success = points[index][_SHORT]
            label = f"{size} phrases" if group == 0 else None
            panel.bar(place, success["rate"], width * 0.92, color=colour, label=label)
            panel.plot([place, place], success["interval"], color="#333", linewidth=1)
    panel.set_xticks(range(len(tasks)), [name_task(task).replace(" ", "\n", 1) for task in tasks])
    panel.set(ylim=(0, 1.03))
    panel.set_yticks(*QUARTERS)
    _clean(panel)
    figure.legend(frameon=False, loc="outside upper left", ncols=3)
    return figure


def _draw_predictions(predictions: Sequence[Mapping[str, Any]]) -> Figure:
    """Predicted against observed success, a dot a task, for each way to draw."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    grid = figure.subplots(1, len(DRAWS), sharey=True)
    colours = matplotlib.colormaps["tab10"](range(10))
    for panel, draw in zip(grid, DRAWS, strict=True):
        panel.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
        for colour, prediction in zip(colours, predictions, strict=False):
            for index, (task, ways) in enumerate(prediction["predicted"].items()):
                truth, told = prediction["truth"][task], ways[draw]
                panel.plot([told["rate"]] * 2, truth["interval"], color=colour, alpha=0.45, linewidth=1)
                panel.plot(told["interval"], [truth["rate"]] * 2, color=colour, alpha=0.45, linewidth=1)
                label = f"{prediction['observed']} from {prediction['source']}" if index == 0 else None
                panel.plot(told["rate"], truth["rate"], "o", color=colour, markersize=4.5, label=label)
        panel.set_title(_DRAWN[draw], fontsize=10, loc="left")
        panel.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="predicted", aspect="equal")
        panel.set_xticks(*QUARTERS)
        panel.set_yticks(*QUARTERS)
        panel.grid(color="#e6e9ee", linewidth=0.8)
        panel.tick_params(length=0)
    grid[0].set_ylabel("observed success within 70 steps")
    figure.legend(*grid[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    return figure
