"""Scores and predictions -> report.json, report.html, tables.md and a PNG of each figure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.files import write_json
from vlm_local.lab.ceiling.curves import draw_figures, save_png
from vlm_local.lab.ceiling.error_models import DRAWS
from vlm_local.lab.ceiling.settings import ALL, ERROR_AXES, MISSED, OPPOSITE, TABLE_RATE
from vlm_local.lab.formats import format_share
from vlm_local.lab.pages import render_svg, write_page


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `folder`/report.json, report.html, tables.md and the figures as PNG.

    report: `score_study`, "plan", "predictions" (of `predict`) and what it was made with. Raises ConfigError where
    nothing can be written.
    """
    write_json(folder / "report.json", report)
    figures = draw_figures(report["curves"], report["predictions"])
    for name, figure in figures.items():
        save_png(figure, folder / f"{name}.png")
    drawn = {name: render_svg(figure) for name, figure in figures.items()}
    for template, name in (("report.html", "report.html"), ("tables.md.txt", "tables.md")):
        write_page(
            folder / name,
            f"ceiling/{template}",
            report,
            made=("plan",),
            cards=_list_cards(report),
            plan=report["plan"],
            figures=drawn,
            axes=ERROR_AXES,
            kinds=(MISSED, OPPOSITE),
            draws=DRAWS,
            rate=TABLE_RATE,
        )


def _list_cards(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Success within 70 steps, mean over tasks, of the settings that are asked for most.

    Where two oracles play a setting, that of the better one in each task: a ceiling is what either can reach.
    """
    wanted = (
        ("scale", "", 1.0, "the oracle as it is"),
        ("vocabulary", "", 513, "513 phrases instead of 729"),
        ("hold", "", 3, "each phrase held for 3 steps"),
        ("latency", "", 1, "one step late (0.2 s)"),
        ("latency", "", 2, "two steps late (0.4 s)"),
        (OPPOSITE, ALL, TABLE_RATE, f"each axis opposite in {format_share(TABLE_RATE, decimals=0)} of moving steps"),
    )
    cards = []
    for study, line, x, text in wanted:
        curves = [c for c in report["curves"] if c["study"] == study and (c["line"] == line or not line)]
        at = list(curves[0]["xs"]).index(x)
        rates = [[c["tasks"][task][at]["success_70"]["rate"] for c in curves] for task in curves[0]["tasks"]]
        rate = float(np.mean(np.max(rates, axis=1)))
        cards.append((format_share(rate, decimals=0), text))
    return cards
