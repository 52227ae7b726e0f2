"""The report's figures as SVG text."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vlm_local.lab.formats import format_share
from vlm_local.lab.offline.scores import MIN_STEPS
from vlm_local.lab.pages import BLACK, BLUE, GREY, QUARTERS, render_svg, styled
from vlm_local.primitives import format_phrase
from vlm_local.types import Primitive

_DARKEST = 1.15  # where a share of 1 lies below the darkest shade: text stays readable


def name_signs(axis: str) -> tuple[str, str, str]:
    """Words of -, 0 and + on an axis, e.g. ("backward", "none", "forward")."""
    words = [format_phrase(Primitive(**{axis: sign})) for sign in (-1, 1)]
    short = [word.removeprefix("move ").removeprefix("rotate ").removesuffix(" gripper") for word in words]
    return short[0], "none", short[1].replace("counterclock", "counter-\nclock")


@styled
def draw_confusion(axis: str, confusion: Sequence[Sequence[int]]) -> str:
    """Heat map of (3, 3) counts, label down and answer across: shade is the share of the label's row.

    Opposite directions are red.
    """
    counts = np.array(confusion, float)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    figure = Figure(figsize=(3, 2.9), layout="constrained")
    plot = figure.subplots()
    opposite = np.abs(np.subtract.outer(range(3), range(3))) == 2
    blue, red = (matplotlib.colormaps[name](shares / _DARKEST) for name in ("Blues", "Reds"))
    plot.imshow(np.where(opposite[:, :, None], red, blue))
    for row, column in np.ndindex(3, 3):
        _write_cell(plot, row, column, float(counts[row, column]), totals[row, 0], float(shares[row, column]))
    names = name_signs(axis)
    plot.set_xticks(range(3), names)
    plot.set_yticks(range(3), names, rotation=90, va="center")
    plot.set_title(axis, fontweight="bold")
    plot.set(xlabel="answer", ylabel="label")
    plot.tick_params(length=0)
    plot.spines[:].set_visible(False)
    return render_svg(figure)


def _write_cell(plot, row: int, column: int, count: float, total: float, share: float) -> None:
    """Count and share; the count alone where the label is too rare for a share to mean anything."""
    if total == 0:
        text = "" if column != 1 else "never"
    elif total < MIN_STEPS:
        text = f"{count:.0f}"
    else:
        text = f"{count:.0f}\n{format_share(share, decimals=0)}"
    plot.text(column, row, text, ha="center", va="center", color="white" if share > 0.6 else BLACK)


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
