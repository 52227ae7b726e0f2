"""The report's bars as SVG text."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from vlm_local.lab.formats import format_share
from vlm_local.lab.pages import BLACK, BLUE, GREY, QUARTERS, render_svg, styled


@styled
def draw_exact(names: Sequence[str], values: Sequence[float], intervals: Sequence[Sequence[float] | None]) -> str:
    """Bars of the exact share, the policy's own first, with 95 % intervals (None for none)."""
    figure = Figure(figsize=(6.4, 0.5 + 0.42 * len(names)), layout="constrained")
    plot = figure.subplots()
    rows = np.arange(len(names))[::-1]
    plot.barh(rows, values, color=[BLUE] + [GREY] * (len(names) - 1), height=0.62)
    for row, value, interval in zip(rows, values, intervals, strict=True):
        low, high = interval or (value, value)
        plot.plot([low, high], [row, row], color=BLACK, linewidth=1.2)
        plot.text(max(high, value) + 0.015, row, format_share(value), va="center")
    plot.set_yticks(rows, names)
    plot.set(xlim=(0, 1.12))
    plot.set_xticks(*QUARTERS)
    plot.tick_params(axis="y", length=0)
    return render_svg(figure)
