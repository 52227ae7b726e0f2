"""The report's figures as SVG text."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vlm_local.lab.figures import STYLE, render_svg
from vlm_local.lab.offline.scores import MIN_STEPS
from vlm_local.primitives import format_phrase
from vlm_local.types import Primitive

_BLUE, _GREY = "#2166ac", "#8a8f98"
_DARKEST = 1.15  # where a share of 1 lies below the darkest shade: text stays readable


def name_signs(axis: str) -> tuple[str, str, str]:
    """Words of -, 0 and + on an axis, e.g. ("backward", "none", "forward")."""
    words = [format_phrase(Primitive(**{axis: sign})) for sign in (-1, 1)]
    short = [word.removeprefix("move ").removeprefix("rotate ").removesuffix(" gripper") for word in words]
    return short[0], "none", short[1].replace("counterclock", "counter-\nclock")


def draw_confusion(axis: str, confusion: list[list[int]]) -> str:
    """Heat map of (3, 3) counts, label down and answer across: shade is the share of the label's row.

    Opposite directions are red.
    """
    counts = np.array(confusion, float)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    with matplotlib.rc_context(STYLE):
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
        text = f"{count:.0f}\n{share:.0%}"
    color = "white" if share > 0.6 else "#222"
    plot.text(column, row, text, ha="center", va="center", color=color)


def draw_reliability(bins: list[list[float]]) -> str | None:
    """Share of right answers against the probability given to them; None without probabilities.

    bins: (NUM_BINS, 3) count, sum of probabilities, right. The size of a dot says how many steps.
    """
    counts, sums, right = np.array(bins).T
    seen = counts > 0
    if not seen.any():
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        plot = figure.subplots()
        plot.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1, label="calibrated")
        mean, share = sums[seen] / counts[seen], right[seen] / counts[seen]
        plot.plot(mean, share, color=_BLUE, linewidth=1.5)
        plot.scatter(mean, share, s=20 + 300 * counts[seen] / counts.sum(), color=_BLUE, alpha=0.75, label="answers")
        for x, y, count in zip(mean, share, counts[seen], strict=True):
            plot.annotate(f"{count:.0f}", (x, y), textcoords="offset points", xytext=(0, 9), ha="center", fontsize=7)
        plot.set(
            xlim=(0, 1), ylim=(-0.02, 1.08), xlabel="probability given to the answer", ylabel="share of right answers"
        )
        plot.legend(frameon=False, loc="upper left")
        return render_svg(figure)


def draw_exact(names: list[str], values: list[float], intervals: list[list[float] | None]) -> str:
    """Bars of the exact share, the policy's own first, with 95 % intervals."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.5 + 0.42 * len(names)), layout="constrained")
        plot = figure.subplots()
        rows = np.arange(len(names))[::-1]
        plot.barh(rows, values, color=[_BLUE] + [_GREY] * (len(names) - 1), height=0.62)
        for row, value, interval in zip(rows, values, intervals, strict=True):
            low, high = interval or (value, value)
            plot.plot([low, high], [row, row], color="#222", linewidth=1.2)
            plot.text(max(high, value) + 0.015, row, f"{value:.1%}", va="center")
        plot.set_yticks(rows, names)
        plot.set(xlim=(0, 1.12), xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=["0", "25 %", "50 %", "75 %", "100 %"])
        plot.tick_params(axis="y", length=0)
        return render_svg(figure)
