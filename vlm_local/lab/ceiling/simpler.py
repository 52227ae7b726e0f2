"""How much of SIMPLER's WidowX tasks can be said, by step size and hold; as `libero.py` asks it of LIBERO."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from vlm_local.environments import SIMPLER
from vlm_local.lab.ceiling.benchmarks import RANDOM, Benchmark, Rates, Steps, draw_levels, draw_line, score_settings
from vlm_local.lab.ceiling.libero import NUMBERS, Setting, prepare, step_in_numbers
from vlm_local.lab.pages import BLUE, GREEN, styled

COMMON = Setting()
FULL = (COMMON, replace(COMMON, hold=2), replace(COMMON, hold=3))
HALF = (replace(COMMON, scale=0.5), replace(COMMON, scale=0.5, hold=2))
DOUBLE = (replace(COMMON, scale=2.0), replace(COMMON, scale=2.0, hold=2))
ALL_SETTINGS = (*FULL, *HALF, *DOUBLE, Setting(NUMBERS), Setting(RANDOM))


def _score(steps: Steps, tasks: Sequence[str]) -> dict[str, Any]:
    return {"settings": score_settings(steps, tasks, ALL_SETTINGS)[0]}


@styled
def _draw(rates: Rates) -> Figure:
    """Success by hold and step size, over all tasks."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    panel = figure.subplots()
    for line, colour, label in ((FULL, BLUE, "12.5 mm"), (HALF, GREEN, "6.25 mm"), (DOUBLE, "black", "25 mm")):
        draw_line(panel, [s.hold for s in line], [rates[s.name]["success"] for s in line], colour, label)
    panel.set(xlabel="control steps a phrase is held", ylabel="success", ylim=(-0.03, 1.03))
    panel.set_xticks([1, 2, 3])
    draw_levels(panel, rates, {NUMBERS: NUMBERS, RANDOM: RANDOM})
    return figure


SIMPLER_STUDY = Benchmark(SIMPLER, ALL_SETTINGS, NUMBERS, step_in_numbers, prepare, _score, _draw)
