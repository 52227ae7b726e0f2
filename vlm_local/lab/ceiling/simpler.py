"""How much of SIMPLER's WidowX tasks can be said, by step size and hold; as `libero.py` asks it of LIBERO."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from vlm_local.environments import SIMPLER
from vlm_local.lab.ceiling.benchmarks import RANDOM, Benchmark, Rates, Steps, score_settings
from vlm_local.lab.ceiling.libero import NUMBERS, Setting, draw_by_hold, prepare, step_in_numbers

COMMON = Setting()
FULL = (COMMON, replace(COMMON, hold=2), replace(COMMON, hold=3))
HALF = (replace(COMMON, scale=0.5), replace(COMMON, scale=0.5, hold=2))
DOUBLE = (replace(COMMON, scale=2.0), replace(COMMON, scale=2.0, hold=2))
ALL_SETTINGS = (*FULL, *HALF, *DOUBLE, Setting(NUMBERS), Setting(RANDOM))


def _score(steps: Steps, tasks: Sequence[str]) -> dict[str, Any]:
    return {"settings": score_settings(steps, tasks, ALL_SETTINGS)[0]}


def _draw(rates: Rates) -> Figure:
    return draw_by_hold(rates, {"12.5 mm": FULL, "6.25 mm": HALF, "25 mm": DOUBLE}, holds=[1, 2, 3])


SIMPLER_STUDY = Benchmark(SIMPLER, ALL_SETTINGS, NUMBERS, step_in_numbers, prepare, _score, _draw)
