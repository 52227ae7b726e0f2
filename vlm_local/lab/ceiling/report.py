"""Scores and predictions -> report.json, report.html, tables.md and a PNG of each figure."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.files import open_replacing, write_json
from vlm_local.lab.ceiling.curves import draw_figures, name_task, save_png, save_svg
from vlm_local.lab.ceiling.mistakes import DRAWS
from vlm_local.lab.ceiling.settings import ALL, MISSED, OPPOSITE, SLIPPING_AXES, STUDIES, TABLE_RATE
from vlm_local.lab.offline.report import open_template

_HERE = Path(__file__).parent


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """report: `score_study`, "plan", "predictions" (of `predict`) and what it was made with."""
    write_json(folder / "report.json", report)
    figures = draw_figures(report["curves"], report["predictions"])
    for name, figure in figures.items():
        save_png(figure, folder / f"{name}.png")
    values = {
        "report": report,
        "plan": report["plan"],
        "cards": _choose_cards(report),
        "points": format_points,
        "span": format_span,
        "title": name_task,
        "axes": SLIPPING_AXES,
        "kinds": (MISSED, OPPOSITE),
        "draws": DRAWS,
        "rate": TABLE_RATE,
        "studies": STUDIES,
    }
    drawn = {name: _render(figure) for name, figure in figures.items()}
    for template, name in (("report.html", "report.html"), ("tables.md.txt", "tables.md")):
        text = open_template(template, _HERE).render(figures=drawn, **values)
        with open_replacing(folder / name) as file:
            file.write(text)


def _render(figure) -> str:
    buffer = io.StringIO()
    save_svg(figure, buffer)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def format_points(share: float) -> str:
    """A difference of shares in points, e.g. "12" or "-3"."""
    return f"{round(100 * share) + 0:d}"


def format_span(interval: Sequence[float]) -> str:
    return f"{format_points(interval[0])} to {format_points(interval[1])}"


def _choose_cards(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(success within 70 steps, mean over tasks; what was done) of what is asked most."""
    wanted = (
        ("scale", "", 1.0, "the oracle as it is"),
        ("vocabulary", "", 513, "513 phrases instead of 729"),
        ("hold", "", 3, "each phrase held for 3 steps"),
        ("latency", "", 1, "one step late (0.2 s)"),
        ("latency", "", 2, "two steps late (0.4 s)"),
        (OPPOSITE, ALL, TABLE_RATE, f"the opposite in {TABLE_RATE:.0%} of moving steps, each axis"),
    )
    cards = []
    for study, line, x, text in wanted:
        curve = next(c for c in report["curves"] if c["study"] == study and (c["line"] == line or not line))
        at = list(curve["xs"]).index(x)
        cards.append((float(np.mean([points[at]["success_70"]["rate"] for points in curve["tasks"].values()])), text))
    return cards
