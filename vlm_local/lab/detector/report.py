"""The scores of a success detector -> report.json and one self-contained report.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_local.lab import pages
from vlm_local.lab.asked import Shown
from vlm_local.lab.formats import format_fixed, format_share, format_span


def write_report(folder: Path, report: Mapping[str, Any], shown: Sequence[Shown]) -> None:
    """Write `folder`/report.json and report.html.

    report: `score_answers` with `policy`, `data`, `question` and how it was made. shown: the pictures of the page.
    Raises ConfigError where nothing can be written.
    """
    calibration = report["calibration"]
    failed = f"{report['failed']} pictures got no answer; they count as wrong."
    pages.write_report(
        folder,
        "detector/report.html",
        report,
        made=("policy",),
        cards=_list_cards(report),
        warnings=[failed] * bool(report["failed"]) + pages.list_warnings(report["policy"], report["left_out"]),
        reliability=None if calibration is None else pages.draw_reliability(calibration["bins"]),
        pictures=[{"image": pages.encode_thumbnail(image), **row} for image, row in shown],
    )


def _list_cards(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    span, majority, calibration = format_span(report["interval"]), report["majority"], report["calibration"]
    shown = report["choices"][: 1 if len(report["choices"]) == 2 else None]  # of two, both have the same area
    cards = [
        (format_share(report["accuracy"]), "right answers" + (f", {span} %" if span else "")),
        (format_share(majority["accuracy"]), f"always “{majority['answer']}”"),
        *((format_fixed(report["by_answer"][choice]["auc"], 3), f"area under ROC, “{choice}”") for choice in shown),
    ]
    if calibration:
        brier = format_fixed(calibration["brier"], 3)
        cards.append((format_fixed(calibration["ece"], 3), f"calibration error (Brier {brier})"))
    return cards
